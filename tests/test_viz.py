"""Pictures of result files: the right numbers behind them, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from processes import assert_draws_without_torch

from pipespec.errors import DataError
from viz.strategy_comparison import draw, main, read_bars
from viz.training_curves import read_curves

ROOT = Path(__file__).resolve().parents[1]
ORIGINALS = ROOT.parent / "shared" / "data" / "pipespec_results"


def write_run(folder: Path, strategy: str, times_s: list[float], **metadata: Any) -> Path:
    """A result file of ten tokens a sample, as the original wrote them."""
    models = [{"path": "meta/Small"}, {"path": "meta/Large"}]
    drafting = {"model_times": [[0.1], [0.2]], "accepted_tokens": [[9]]}
    times = {"token_times": [0.1] * 9} if strategy == "greedy" else drafting
    content = {
        "metadata": {"strategy": strategy, "model_configs": models, "dataset": "set", **metadata},
        "results": [
            {
                "sample_index": index,
                "strategy": strategy,
                "metrics": {"total_time": time_s, "tokens_generated": 10, **times},
                "output_text": "same",
                "input_text": f"prompt {index}",
                "gpustats": [],
            }
            for index, time_s in enumerate(times_s)
        ],
    }
    path = folder / f"{strategy}_{metadata.get('lookahead', '')}.json"
    path.write_text(json.dumps(content))
    return path


def values(axes: Axes) -> list[float]:
    """Lengths of the bars of a panel."""
    return [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]


def test_a_bar_is_all_tokens_by_all_time_and_its_dots_are_the_samples(tmp_path: Path) -> None:
    files = [
        write_run(tmp_path, "async-chain", [0.5, 1.0], lookahead=0),
        write_run(tmp_path, "greedy", [1.0, 4.0]),
    ]
    greedy, chain = read_bars(files)
    assert greedy.label == "greedy, Large"
    assert chain.label == "async-chain, Small > Large, lookahead 0"
    assert greedy.tokens_per_s == pytest.approx(20 / 5)
    assert chain.sample_rates == pytest.approx((20, 10))
    assert greedy.speed_up == pytest.approx(1.0)
    assert chain.speed_up == pytest.approx(5 / 1.5)

    speeds, gains = draw([greedy, chain]).axes
    assert values(speeds) == pytest.approx([20 / 5, 20 / 1.5])
    assert values(gains) == pytest.approx([1.0, 5 / 1.5])


def test_a_speed_up_is_taken_on_the_prompts_of_both_runs(tmp_path: Path) -> None:
    files = [
        write_run(tmp_path, "greedy", [2.0, 2.0, 2.0]),
        write_run(tmp_path, "chain", [1.0], lookahead=4),
    ]
    assert read_bars(files)[1].speed_up == pytest.approx(2.0)


@pytest.mark.parametrize(
    "other", [{"dataset": "another"}, {"model_configs": [{"path": "meta/Other"}]}]
)
def test_a_run_without_its_own_greedy_has_no_speed_up(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    files = [
        write_run(tmp_path, "greedy", [1.0], **other),
        write_run(tmp_path, "chain", [1.0], lookahead=4),
    ]
    bars = {bar.strategy: bar for bar in read_bars(files)}
    assert bars["chain"].speed_up is None
    assert len(values(draw([bars["chain"]]).axes[1])) == 0


def test_runs_are_sorted_by_strategy_and_lookahead_as_a_number(tmp_path: Path) -> None:
    files = [write_run(tmp_path, "chain", [1.0], lookahead=n) for n in (10, 2, 1)]
    files.append(write_run(tmp_path, "greedy", [1.0]))
    labels = [bar.label.rpartition(" ")[2] for bar in read_bars(files)]
    assert labels == ["Large", "1", "2", "10"]


def test_the_command_draws_a_folder_without_torch(tmp_path: Path) -> None:
    write_run(tmp_path, "greedy", [1.0, 2.0])
    write_run(tmp_path, "chain", [1.0, 1.5], lookahead=4)
    assert_draws_without_torch("viz.strategy_comparison", tmp_path, "2 runs")


def test_wrong_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("[]")
    for flags, named in (
        ([str(tmp_path / "empty")], "has no .json files"),
        ([str(tmp_path / "nowhere.json")], "no file or folder"),
        ([str(tmp_path), "--output", "picture.bmp"], "must end in .png"),
    ):
        assert main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line


@pytest.mark.shared_data
def test_the_originals_files_give_the_published_numbers() -> None:
    """On the ten prompts that both have; the published 2.54 divides by other prompts."""
    bars = {bar.label: bar for bar in read_bars(sorted(ORIGINALS.glob("*.json")))}
    assert len(bars) == 50
    best = next(bar for label, bar in bars.items() if label.count(">") == 2 and "async" in label)
    assert best.speed_up == pytest.approx(2.636, abs=0.001)
    greedy = bars["greedy, Meta-Llama-3.1-70B-Instruct"]
    assert 1000 / greedy.tokens_per_s == pytest.approx(123.69, abs=0.01)


@pytest.mark.parametrize(
    "models",
    [
        [],
        [{"name": "a", "curve": []}],
        [{"name": "a", "curve": [[0, 1.0]]}],
        [{"name": "a", "curve": [[1, -1.0]]}],
        [{"name": "a", "curve": [[1, float("nan")]]}],
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(models: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.write_text(json.dumps({"models": models}))
    with pytest.raises(DataError, match="of a training run"):
        read_curves(path)
