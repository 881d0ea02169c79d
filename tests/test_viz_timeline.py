"""Timelines: who did what when, from a trace, from our result files and from the original's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA
from emulated import write_emulated, write_prompts
from processes import run_python

from pipespec import benchmark
from pipespec.errors import NothingLeftError
from pipespec.results import load_results
from pipespec.trace.check import read_trace
from viz.pipeline_timeline import draw, find_window, main, read_pictures
from viz.timelines import BY_ROUNDS, NO_STARTS, Lane, Timeline, read_timelines, timeline_of
from viz.utils import COLUMN_WIDTH

MODELS = [{"path": "meta/Small-1B"}, {"path": "meta/Large-8B"}]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all strategies: `trace.json`, and the result files in `out`."""
    folder = tmp_path_factory.mktemp("traced")
    files = ["--models-config-path", write_emulated(folder, 3, target_ms=2.0)]
    files += ["--dataset", write_prompts(folder, ["one two three", "four five"])]
    files += ["--output-dir", str(folder / "out"), "--trace", str(folder / "trace.json")]
    assert benchmark.main([*files, "--strategy", "all", "--max-new-tokens", "40"]) == 0
    return folder


def of_trace(folder: Path, sample: int = 0) -> dict[str, Timeline]:
    content = read_trace(folder / "trace.json")
    return {timeline.title: timeline for timeline in read_timelines(content, sample)}


def of_results(folder: Path) -> dict[str, Timeline]:
    runs = [load_results(path) for path in (folder / "out").iterdir()]
    return {
        run.metadata["strategy"]: timeline_of("", run.metadata, run.results[0]["metrics"])
        for run in runs
    }


def num_lost(lane: Lane) -> float:
    """Tokens of a draft that were rolled back."""
    return sum(found.rejected * found.num_emitted for found in lane.slices)


def test_both_sources_show_the_same_steps_of_the_target(traced: Path) -> None:
    ours, results = of_trace(traced), of_results(traced)
    assert list(ours) == ["greedy", "chain", "async-chain"]
    for strategy, timeline in ours.items():
        assert [lane.name for lane in timeline.lanes] == [
            lane.name for lane in results[strategy].lanes
        ]
        one, other = timeline.lanes[-1].forwards, results[strategy].lanes[-1].forwards
        assert len(one) >= 5
        assert [found.num_emitted for found in one] == [found.num_emitted for found in other]
        assert [found.rejected for found in one] == [found.rejected for found in other]
        assert [found.start_s for found in one] == pytest.approx(
            [found.start_s for found in other], abs=0.005
        )


def test_a_trace_shows_every_token_that_a_rollback_removed(traced: Path) -> None:
    """Of the draft before the target. From the first one it also removes what the middle one had
    put there, and in async-chain what was prepared."""
    path = traced / "out" / "chain_draft-middle-target_auto.json"
    (removed, *_) = (result["metrics"]["num_rolled_back"] for result in load_results(path).results)
    lanes = of_trace(traced)["chain"].lanes
    assert num_lost(lanes[1]) == pytest.approx(removed[1])
    assert 0 < num_lost(lanes[0]) <= removed[0]


def test_result_files_tell_about_as_much_of_what_was_lost(traced: Path) -> None:
    exact, estimate = of_trace(traced)["chain"].lanes[1], of_results(traced)["chain"].lanes[1]
    assert num_lost(estimate) == pytest.approx(num_lost(exact), abs=0.5 * num_lost(exact) + 2)


def test_verdicts_lead_one_lane_up(traced: Path) -> None:
    for strategy in ("chain", "async-chain"):
        verdicts = of_trace(traced)[strategy].verdicts
        assert {(arrow.from_lane, arrow.to_lane) for arrow in verdicts} == {(1, 0), (2, 1)}
        assert all(arrow.sent_s <= arrow.received_s for arrow in verdicts)


def test_a_panel_has_what_lies_in_the_window(traced: Path) -> None:
    timelines = [timeline.since_prefill() for timeline in of_trace(traced, 1).values()]
    window_s = find_window(timelines, None, None, 5)
    assert window_s == (0.0, min(timeline.end_of_steps(5) for timeline in timelines))
    panels = draw(timelines, window_s, COLUMN_WIDTH).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["greedy", "chain", "async-chain"]
    for axes, timeline in zip(panels, timelines):
        seen = [found for lane in timeline.lanes for found in lane.within(window_s)]
        num_rejected = sum(found.rejected > 0 for found in seen)
        assert len(axes.patches) == len(seen) + num_rejected
    assert [label.get_text() for label in panels[2].get_yticklabels()] == [
        *("draft", "middle", "target")
    ]


def test_what_a_result_file_rejects_is_shared_out_over_those_who_wrote_it() -> None:
    """Four drafts, of which two are accepted, while a fifth is written in vain."""
    metrics = {
        "total_time": 1.0,
        "model_times": [[0.1] * 6, [0.2, 0.1]],
        "model_starts": [[0.1, 0.2, 0.3, 0.4, 0.55, 0.8], [0.5, 0.9]],
        "accepted_tokens": [[3, 2]],
        "offered_tokens": [[4, 1]],
        "prefill_times_s": [0.05, 0.09],
    }
    metadata = {"strategy": "async-chain", "model_configs": MODELS}
    draft, target = timeline_of("", metadata, metrics).lanes
    assert [found.rejected for found in draft.forwards] == [0, 0, 1, 1, 1, 0]
    assert [found.rejected for found in target.forwards] == [2 / 5, 0]
    assert [lane.slices[0].kind for lane in (draft, target)] == ["prefill", "prefill"]


def test_a_chain_without_starts_is_laid_out_by_rounds() -> None:
    metrics = {"total_time": 1.0, "model_times": [[0.1] * 4, [0.2, 0.2]], "accepted_tokens": [[3]]}
    timeline = timeline_of("", {"strategy": "chain", "model_configs": MODELS}, metrics)
    draft, target = timeline.lanes
    assert [found.start_s for found in draft.slices] == pytest.approx([0.2, 0.3, 0.6, 0.7])
    assert [found.start_s for found in target.slices] == pytest.approx([0.4, 0.8])
    assert timeline.note == BY_ROUNDS


def test_other_strategies_without_starts_are_drawn_end_to_end() -> None:
    metrics = {"total_time": 1.0, "model_times": [[0.2] * 4, [0.3, 0.3]], "accepted_tokens": [[3]]}
    timeline = timeline_of("", {"strategy": "async-chain", "model_configs": MODELS}, metrics)
    draft, target = timeline.lanes
    assert [found.start_s for found in draft.slices] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [found.start_s for found in target.slices] == pytest.approx([0.2, 0.5])
    assert timeline.note == NO_STARTS


def write_run(path: Path, **metrics: Any) -> None:
    whole = {"total_time": 1.0, "tokens_generated": 3, **metrics}
    result = {
        "sample_index": 0,
        "strategy": "greedy",
        "metrics": whole,
        "output_text": "",
        "input_text": "",
        "gpustats": [],
    }
    metadata = {"strategy": "greedy", "model_configs": MODELS, "dataset": "set", "lookahead": 0}
    path.write_text(json.dumps({"metadata": metadata, "results": [result]}))


def test_what_cannot_be_drawn_is_named_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "whole.json", token_times=[0.1, 0.1])
    write_run(tmp_path / "empty.json", token_times=[])
    write_run(tmp_path / "lacking.json")
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "broken.json").write_text('{"traceEvents": [{"ph": "B"}]}')
    (timeline,) = read_pictures([tmp_path], 0)["Large-8B"]
    assert len(timeline.lanes[0].slices) == 2
    lines = capsys.readouterr().err.splitlines()
    for name, reason in {
        "empty.json": "has no step of the target after its prefill, in greedy",
        "lacking.json": "is not a result file",
        "other.json": "is not a result file",
        "broken.json": "event 0: has the unknown phase 'B'",
    }.items():
        assert [line for line in lines if name in line and reason in line], lines
    with pytest.raises(NothingLeftError):
        read_pictures([tmp_path], 7)


def test_wrong_flags_are_named(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, figures = str(traced / "trace.json"), ["--output-dir", str(traced / "figures")]
    assert main([trace, *figures, "--start", "2", "--end", "1"]) == 2
    assert "error: --start is 2 and --end 1" in capsys.readouterr().err
    assert main([trace, *figures, "--sample", "7"]) == 1
    assert "it has no sample 7; name another with --sample" in capsys.readouterr().err


def test_the_script_draws_a_trace_and_a_folder_without_torch(traced: Path) -> None:
    code = (
        "import sys; from viz.pipeline_timeline import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    figures = traced / "figures"
    flags = ["--page", "--format", "png", "--output-dir", str(figures)]
    run = run_python(code, str(traced / "trace.json"), str(traced / "out"), *flags)
    assert run.returncode == 0, run.stderr
    paths = [figures / f"pipeline-timeline-{name}.png" for name in ("trace", "target")]
    assert run.stdout.splitlines() == [str(path) for path in paths]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.shared_data
def test_the_originals_files_are_drawn() -> None:
    pictures = read_pictures([SHARED_DATA / "pipespec_results"], 0)
    titles = {target: [t.title for t in found] for target, found in pictures.items()}
    assert titles["Llama-3.1-8B-Instruct"] == [
        "greedy",
        "chain, lookahead 7",
        "async-chain, lookahead 3",
    ]
    for timelines in pictures.values():
        draw(timelines, find_window(timelines, None, None, 16), COLUMN_WIDTH)
