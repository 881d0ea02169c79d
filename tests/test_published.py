"""The published numbers, the runs that stand beside them, and the table of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SHARED_DATA

from pipespec.comparison import published
from pipespec.config import load_models_config
from pipespec.metrics import speed_up, summarise
from pipespec.results import load_results, result_file_name

NUMBERS = Path(__file__).resolve().parents[1] / "launch" / "published.json"
GROUPS = json.loads(NUMBERS.read_text())["groups"]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("hardware", ["emulated", "real"])
def test_every_published_run_has_its_models(group: str, hardware: str, tmp_path: Path) -> None:
    runs = published.read_published(NUMBERS, group, hardware)
    lines = published.plan(runs, tmp_path)
    for line in lines:
        models = load_models_config(Path(line[line.index("--models-config-path") + 1]))
        assert all((model.emulated is not None) == (hardware == "emulated") for model in models)
    assert len({tuple(line) for line in lines}) == len(lines)
    by_default = [line for line in lines if "--lookahead" not in line]
    assert {line[line.index("--strategy") + 1] for line in by_default} == {
        *("greedy", "chain", "async-chain")
    }


@pytest.mark.shared_data
@pytest.mark.parametrize("group", GROUPS)
def test_the_numbers_are_those_of_the_original_s_files(group: str) -> None:
    folder = SHARED_DATA / "pipespec_results"
    runs = published.read_published(NUMBERS, group, "real").runs
    greedy = load_results(folder / f"greedy_{runs[0].models[-1]}.json").results
    for run in runs:
        lookahead = int(run.flag("--lookahead") or 0) + (run.strategy == "chain")
        name = result_file_name(run.strategy, run.models, lookahead)
        results = load_results(folder / name).results
        assert summarise(results).ms_per_token == pytest.approx(run.ms_per_token, abs=0.0051)
        assert speed_up(results, greedy).speed_up == pytest.approx(run.speed_up, abs=0.00051)


def test_what_has_not_run_is_left_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["table", str(NUMBERS), "--group", "8b", "--output-dir", str(tmp_path)]
    assert published.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "EMULATED 8b: published, and ours"
    (row,) = [line.split() for line in lines if line.startswith("greedy")]
    assert row == ["greedy", "8B", "-", "22.5", "1.00x", *["-"] * 3]


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for path, group, complaint in (
        (NUMBERS, "7b", "--group is 7b; "),
        (tmp_path / "x.json", "8b", "x.json is no file of published runs"),
        (tmp_path / "none.json", "8b", "none.json: No such file"),
    ):
        flags = ["plan", str(path), "--group", group, "--output-dir", str(tmp_path)]
        assert published.main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line
