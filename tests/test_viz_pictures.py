"""The pictures of result files: every script alone, with files of any kind, and the looks."""

from __future__ import annotations

import importlib
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA
from processes import run_python
from result_files import MODELS, metadata, sample, write_run

from viz import (
    frequency_accepted_tokens,
    lookahead_analysis,
)
from viz.utils import looks, make_panels, number, save, style

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = SHARED_DATA / "pipespec_results"
PICTURES = {
    "frequency_accepted_tokens": "token-frequency-distribution",
    "token_analysis": "token-analysis",
    "token_generation_comparison": "token-generation-comparison",
    "gpu_usage_analysis": "gpu-usage-analysis",
    "gpu_stats": "gpu-analysis",
    "lookahead_analysis": "lookahead-analysis",
    "sweep": "tokens-per-s-over-lookahead",
    "dataset_lengths": "dataset-lengths",
}
HELPERS = {"utils", "timelines"}
SCRIPTS = sorted({path.stem for path in (ROOT / "viz").glob("[a-z]*.py")} - HELPERS)
SMALL, MIDDLE, LARGE = MODELS


def monitored(item: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
    """The sample with three readings of three GPUs; the second is lost after the first reading."""
    stats = [
        {
            "timestamp": 0.5 * i,
            "gpu_utilizations": [10 * i * scale, 50 if i == 0 else None, 30],
            "gpu_memories": [5, 20 if i == 0 else None, 40],
            "gpu_powers": [100 * scale, 60 if i == 0 else None, 80],
        }
        for i in range(3)
    ]
    return {**item, "gpustats": stats}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of each strategy, as the original wrote them, with 2 samples each."""
    runs = tmp_path / "runs"
    greedy = [monitored(sample(i, 2.0, 10)) for i in range(2)]
    write_run(runs / "a.json", metadata("greedy", [LARGE]), greedy)
    for name, strategy, lookahead in (("b", "chain", 4), ("c", "async-chain", 0)):
        results = [monitored(sample(i, 1.0, 10, [[1, 2, 3, 3]])) for i in range(2)]
        run = metadata(strategy, [SMALL, LARGE], lookahead)
        write_run(runs / f"{name}.json", run, results)
    return runs


def draw(name: str, *arguments: object) -> int:
    """The exit code of a script."""
    main: Callable[[list[str]], int] = importlib.import_module(f"viz.{name}").main
    return main([str(argument) for argument in arguments])


# -- every script -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "picture"), PICTURES.items())
def test_a_script_writes_each_format_and_names_what_it_passes_over(
    name: str, picture: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "b.json").read_text()
    (folder / "cut.json").write_text(whole[:-200])
    (folder / "list.json").write_text("[1, 2]")
    (folder / "race.json").write_text('{"metadata": {"command": "x"}, "turns": []}')
    newer = {**metadata("chain", [SMALL, LARGE]), "schema_version": 99}
    write_run(folder / "newer.json", newer, [sample(0, 1.0, 2, [[1]])])
    empty = sample(0, 1.0, 1, [[1]])
    empty["metrics"]["tokens_generated"] = 0
    write_run(folder / "zero.json", metadata("chain", [SMALL, LARGE]), [empty])
    write_run(folder / "no.json", metadata("chain", [SMALL, LARGE]), [])
    wrong = monitored(sample(0, 1.0, 2, [[1]]))
    wrong["metrics"]["accepted_tokens"] = ["x", None]
    write_run(folder / "wrong.json", metadata("chain", [SMALL, MIDDLE]), [wrong])
    out = tmp_path / "figures"
    assert draw(name, folder, "--output-dir", out) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(out / f"{picture}.{form}") for form in ("pdf", "png")]
    for path in ("cut", "list", "race", "newer", "zero", "no"):
        (line,) = [line for line in printed.err.splitlines() if f"{path}.json" in line]
        assert line.startswith("passed over: ")
    assert not any(f"{run}.json" in printed.err for run in ("/b", "/c"))
    pdf = (out / f"{picture}.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf, "embedded TrueType fonts"
    assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PICTURES)
def test_only_where_nothing_is_left_the_exit_code_is_1(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text("[]")
    assert draw(name, tmp_path, "--output-dir", tmp_path / "out") == 1
    skipped, error = capsys.readouterr().err.splitlines()
    assert skipped.startswith("passed over") and "other.json" in skipped
    assert error.startswith("error: none of 1 files could be used")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["frequency_accepted_tokens", "gpu_usage_analysis", "gpu_stats"])
def test_runs_that_have_nothing_for_a_picture_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "greedy.json", metadata("greedy", [LARGE]), [sample(0, 1.0, 4)])
    assert draw(name, tmp_path, "--output-dir", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "greedy" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--format", "png,bmp"], "--format is png,bmp; it may name png, pdf, svg"),
        (["--output-dir", "/dev/null/x"], "--output-dir: cannot write to /dev/null/x"),
        (["--metric", "speed"], "--metric is speed; it must be one of acceptance_rate, block_eff"),
        (["--over", "luck"], "flags of these runs are lookahead"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: list[str], complaint: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert draw("sweep", folder, "--output-dir", tmp_path / "out", *flags) in (1, 2)
    assert complaint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_a_file_of_a_clone_that_is_not_installed(name: str) -> None:
    environment = {"PYTHONPATH": sysconfig.get_path("purelib")}  # its .pth files are not read
    run = subprocess.run(
        [sys.executable, "-S", str(ROOT / "viz" / f"{name}.py"), "--help"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "usage: " in run.stdout


def test_no_picture_needs_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {list(PICTURES)}:\n"
        "    main = importlib.import_module(f'viz.{name}').main\n"
        f"    assert main([{str(folder)!r}, '--output-dir', {str(tmp_path)!r}, '--format', 'png'])"
        " == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr


def test_a_picture_that_is_too_tall_is_drawn_smaller(tmp_path: Path) -> None:
    with style():
        figure, panels = make_panels(1, 400.0)
        assert len(panels) == 1
        save(figure, tmp_path / "tall.png")
    assert (tmp_path / "tall.png").stat().st_size > 0


# -- looks ------------------------------------------------------------------------------------


def test_runs_of_a_panel_look_different_without_their_colours() -> None:
    pairs = ([SMALL, LARGE], [MIDDLE, LARGE], [SMALL, MIDDLE, LARGE])
    runs = [metadata(s, models) for s in ("chain", "async-chain") for models in pairs]
    look = looks(runs)
    for strategy in ("chain", "async-chain"):
        found = [look(run) for run in runs if run["strategy"] == strategy]
        for kind in ("line", "marker", "hatch"):
            assert len({getattr(each, kind) for each in found}) == len(pairs)


def test_numbers_have_the_digits_that_a_reader_can_use() -> None:
    assert [number(value) for value in (12345.6, 123.69, 48.756, 0.12345, 0.0)] == [
        "12,346", "123.7", "48.76", "0.123", "0"
    ]  # fmt: skip


# -- the original's files ---------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize("number_of_files", [1, 50])
def test_lookahead_is_drawn_of_one_file_and_of_fifty(number_of_files: int, tmp_path: Path) -> None:
    files = sorted(PUBLISHED.glob("*.json"))[:number_of_files]
    arguments = [*map(str, files), "--output-dir", str(tmp_path), "--format", "png"]
    assert lookahead_analysis.main(arguments) == 0
    assert frequency_accepted_tokens.main([*arguments, "--all"]) == 0
