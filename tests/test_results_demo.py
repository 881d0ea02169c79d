"""`results/demo`: one small real run, of which every command that reads results shows something."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from test_viz_pictures import PICTURES

from pipespec import print_benchmark_stats, report
from pipespec.results import find_files, read_runs

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "results" / "demo"
DRAWN = {**PICTURES, "pipeline_timeline": "pipeline-timeline"}


def test_it_is_small_and_whole() -> None:
    files = find_files([DEMO])
    assert sum(path.stat().st_size for path in files) < 300_000
    skipped: list[str] = []
    runs = read_runs([DEMO], lambda result: result["token_lengths"], skipped.append)
    assert not skipped and len(runs) == len(files)
    strategies = [run.metadata["strategy"] for run in runs]
    assert set(strategies) == {"greedy", "chain", "async-chain"}
    assert not any(str(run.metadata["commit"]).endswith("-dirty") for run in runs)
    different = [run.metadata.get("greedy_comparison") or {} for run in runs]
    assert sum(item.get("num_different", 0) for item in different) == 0


@pytest.mark.parametrize("name", DRAWN)
def test_every_picture_can_be_drawn_of_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(f"viz.{name}")
    assert script.main([str(DEMO), "--output-dir", str(tmp_path), "--format", "png"]) == 0
    assert "passed over" not in capsys.readouterr().err
    assert list(tmp_path.glob(f"{DRAWN[name]}*.png"))


def test_statistics_and_report_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_benchmark_stats.main([str(DEMO)]) == 0
    printed = capsys.readouterr()
    assert "async-chain" in printed.out and not printed.err
    page = tmp_path / "report.html"
    assert report.main([str(DEMO), "--output", str(page)]) == 0
    assert "correction" in page.read_text()
