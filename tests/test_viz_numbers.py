"""The numbers behind the pictures of result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA
from emulated import write_emulated
from result_files import MODELS, metadata, sample, write_run
from test_viz_pictures import draw, monitored

from pipespec.metrics import sample_totals
from pipespec.results.labels import short_names, stage_devices
from viz import (
    dataset_lengths,
    frequency_accepted_tokens,
    gpu_stats,
    gpu_usage_analysis,
    sweep,
    token_analysis,
    token_generation_comparison,
)
from viz.utils import read, read_sample, sample_index, style

PUBLISHED = SHARED_DATA / "pipespec_results"
SMALL, MIDDLE, LARGE = MODELS


# -- tokens -----------------------------------------------------------------------------------


def counts(*numbers: int) -> list[dict[str, Any]]:
    return [sample(0, 1.0, sum(numbers) + 1, [list(numbers)])]


def test_shares_of_verifications_sum_to_100_in_the_originals_bins(tmp_path: Path) -> None:
    numbers = [1, 2, 2, 9, 10, 14, 15, 29, 30, 300, 0]  # the last was overtaken
    write_run(tmp_path / "a.json", metadata("chain", [SMALL, LARGE], 4), counts(*numbers))
    (run,) = read([tmp_path], frequency_accepted_tokens.count_tokens)
    bins = frequency_accepted_tokens.bins_up_to(300)
    assert [found.label for found in bins] == [
        *map(str, range(1, 10)), "10-14", "15-19", "20-24", "25-29", "30+"
    ]  # fmt: skip
    shares = frequency_accepted_tokens.shares(run, bins)
    assert sum(shares) == pytest.approx(100)
    assert shares == pytest.approx([10, 20, 0, 0, 0, 0, 0, 0, 10, 20, 10, 0, 10, 20])
    assert [found.label for found in frequency_accepted_tokens.bins_up_to(3)] == ["1", "2", "3"]


def test_bars_of_a_few_runs_and_a_table_of_many_have_the_same_numbers(tmp_path: Path) -> None:
    for lookahead in range(8):
        run = metadata("chain", [SMALL, LARGE], lookahead)
        write_run(tmp_path / f"{lookahead}.json", run, counts(1, 2, 2, 2))
    runs = read([tmp_path], frequency_accepted_tokens.count_tokens)
    with style():
        (bars,) = frequency_accepted_tokens.draw(runs[:2]).axes
        (table,) = frequency_accepted_tokens.draw(runs).axes
    assert [bar.get_height() for bar in bars.patches] == [25, 75, 25, 75]  # type: ignore[attr-defined]
    assert [text.get_text() for text in table.texts] == ["25", "75"] * 8
    labels = [label.get_text() for label in table.get_yticklabels()]
    assert labels[:2] == ["chain, small > large, lookahead 0", "chain, small > large, lookahead 1"]


def test_a_steps_time_is_shared_by_the_tokens_it_emitted(tmp_path: Path) -> None:
    results = counts(1, 2, 2, 0)
    results[0]["metrics"]["model_times"] = [[9.0], [0.3, 0.4, 0.6, 5.0]]
    write_run(tmp_path / "a.json", metadata("chain", [SMALL, LARGE], 4), results)
    (run,) = read([tmp_path], token_analysis.count_and_time)
    bins = frequency_accepted_tokens.bins_up_to(3)
    assert token_analysis.ms_per_token(run.samples, bins) == [
        pytest.approx(300), pytest.approx(250), None
    ]  # fmt: skip


def test_arrivals_of_our_files_are_what_they_say() -> None:
    metrics = {"total_time": 2.0, "tokens_generated": 6, "arrivals": [[0.5, 1], [1.0, 3], [2.0, 2]]}
    assert token_generation_comparison.arrivals(metrics) == [(0.5, 1), (1.0, 4), (2.0, 6)]


def test_arrivals_of_the_originals_greedy_files_begin_with_the_time_that_is_not_logged() -> None:
    metrics = {"total_time": 2.0, "tokens_generated": 3, "token_times": [0.5, 0.25]}
    assert token_generation_comparison.arrivals(metrics) == [(1.25, 1), (1.75, 2), (2.0, 3)]


@pytest.mark.parametrize(
    ("times", "accepted", "num_tokens", "expected"),
    [
        # chain: drafts are between verifications; what it logged beyond the end is cut off
        ([[0.2, 0.2], [0.5, 0.5]], [2, 4], 5, [(0.6, 1), (1.3, 3), (2.0, 5)]),
        # async-chain: drafts run beside them; the last verification is not in the log
        ([[2.0], [0.4, 0.4]], [2, 2], 9, [(0.8, 1), (1.2, 3), (1.6, 5), (2.0, 9)]),
    ],
)
def test_arrivals_of_the_originals_files_end_with_the_last_token(
    times: list[list[float]],
    accepted: list[int],
    num_tokens: int,
    expected: list[tuple[float, int]],
) -> None:
    metrics = {
        "total_time": 2.0, "tokens_generated": num_tokens, "model_times": times,
        "accepted_tokens": [accepted],
    }  # fmt: skip
    found = token_generation_comparison.arrivals(metrics)
    assert [n for _, n in found] == [n for _, n in expected]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected])


def test_the_sample_is_the_first_that_all_runs_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        results = [sample(i, 1.0, 4, [[3]]) for i in range(2)]
        run = metadata("chain", [SMALL, LARGE], number)
        write_run(tmp_path / f"{number}.json", run, results)
    late = [sample(i, 1.0, 4, [[3]]) for i in (1, 2)]
    write_run(tmp_path / "d.json", metadata("chain", [MIDDLE, LARGE], 4), late)
    runs = read([tmp_path], sample_index)
    index, found = read_sample(runs, None, lambda result: result["sample_index"])
    assert index == 1 and [kept for _, kept in found] == [1] * 4
    index, found = read_sample(runs, 2, lambda result: result["sample_index"])
    assert index == 2 and [run.path.name for run, _ in found] == ["d.json"]
    assert capsys.readouterr().err.count("has no sample 2") == 3


# -- devices ----------------------------------------------------------------------------------


def test_each_device_of_a_run_is_a_line_of_one_sample_called_by_its_model(tmp_path: Path) -> None:
    run = metadata("chain", [SMALL, LARGE], 4)
    run["model_configs"][0]["devices"] = "cuda:1"
    run["model_configs"][1]["devices"] = ["cuda:2", "cuda:0"]
    results = [monitored(sample(i, 1.0, 4, [[3]]), scale=i) for i in range(2)]
    write_run(tmp_path / "a.json", run, results)
    (row,) = gpu_usage_analysis.read_rows(read([tmp_path], sample_index), 1, 45.0)
    assert row.seconds == 1.0, "the sample is shorter than the window"
    lines = {device.label: device.series["gpu_utilizations"] for device in row.devices}
    assert lines == {
        "small: GPU 1": [(0.0, 50.0)],  # lost after the first reading
        "large: GPU 2": [(0.0, 30.0), (0.5, 30.0), (1.0, 30.0)],
        "large: GPU 0": [(0.0, 0.0), (0.5, 10.0), (1.0, 20.0)],
    }
    with style():
        assert len(gpu_usage_analysis.draw([row]).axes) == 3


def test_where_the_devices_of_models_are_not_known_all_are_drawn(tmp_path: Path) -> None:
    run = metadata("greedy", [LARGE])
    run["model_configs"][0]["devices"] = "auto"
    write_run(tmp_path / "a.json", run, [monitored(sample(0, 1.0, 4))])
    (row,) = gpu_usage_analysis.read_rows(read([tmp_path], sample_index), None, 0.7)
    assert [device.label for device in row.devices] == ["GPU 0", "GPU 1", "GPU 2"]
    assert row.seconds == 0.7


def test_the_monitor_says_which_device_is_whose(tmp_path: Path) -> None:
    kinds = ("process", "process", "cpu-package")
    monitor = {"stages": [[0], [1]], "devices": [{"kind": kind} for kind in kinds]}
    run = metadata("async-chain", [SMALL, LARGE], 4, monitor=monitor)
    results = [monitored(sample(0, 1.0, 4, [[3]], mean_utilization=[80.0, 40.0]))]
    write_run(tmp_path / "a.json", run, results)
    (row,) = gpu_usage_analysis.read_rows(read([tmp_path], sample_index), None, 45.0)
    assert [d.label for d in row.devices] == ["small: process", "large: process", "CPU"]
    (found,) = map(gpu_stats.usage, read([tmp_path], gpu_stats.measured))
    assert found.utilization == 60.0
    assert found.power_w == 80.0, "of the processor's package; a process has none of its own"


def test_energy_is_that_of_the_runs_own_devices(tmp_path: Path) -> None:
    write_run(
        tmp_path / "a.json", metadata("chain", [SMALL, LARGE], 4),
        [monitored(sample(0, 2.0, 10, [[9]])), sample(1, 1.0, 10, [[9]])],  # no stats of the second
    )  # fmt: skip
    counted = [monitored(sample(0, 2.0, 10, [[9]], energy_j=30.0))]
    write_run(tmp_path / "b.json", metadata("chain", [SMALL, LARGE], 5), counted)
    estimated, by_counter = map(gpu_stats.usage, read([tmp_path], gpu_stats.measured))
    assert estimated.power_w == 160.0
    assert estimated.energy_j == 320.0
    assert estimated.energy_per_token_j == 32.0
    # What is read at 0 s was before the sample; the second device is lost after it.
    assert estimated.utilization == pytest.approx((10 + 20) / 2)
    assert estimated.tokens_per_s == pytest.approx(20 / 3)
    assert (by_counter.energy_j, by_counter.energy_per_token_j) == (30.0, 3.0)


# -- flags and lengths ------------------------------------------------------------------------


def write_sweep(folder: Path, speeds: dict[tuple[int, int], float], **more: Any) -> None:
    """async-chain runs of 10 tokens, by lookahead and outcomes: seconds."""
    for (lookahead, outcomes), seconds in speeds.items():
        run = metadata("async-chain", [SMALL, LARGE], lookahead, outcomes=outcomes, **more)
        name = f"{lookahead}-{outcomes}-{more.get('lookahead_mode', '')}.json"
        write_run(folder / name, run, [sample(0, seconds, 10, [[9]])])


def test_lines_of_a_sweep_differ_in_what_is_not_swept(tmp_path: Path) -> None:
    write_run(tmp_path / "greedy.json", metadata("greedy", [LARGE]), [sample(0, 4.0, 10)])
    write_sweep(tmp_path, {(10, 0): 3.0, (2, 0): 2.0, (2, 4): 1.0})
    write_sweep(tmp_path, {(3, 4): 1.5}, lookahead_mode="auto")
    runs = read([tmp_path], sample_totals)
    (panel,) = sweep.read_panels(runs, "ms_per_token", "lookahead")
    assert panel.title == "humaneval, target large"
    greedy, without, four = panel.lines
    assert greedy.is_level and greedy.points[0].value == 400
    assert [(p.place, p.value) for p in without.points] == [(2, 200), (10, 300)]
    assert without.label == "async-chain, small > large, outcomes 0"
    assert [(p.place, p.value, p.is_chosen) for p in four.points] == [
        (2, 100, False), (3, 150, True)
    ]  # fmt: skip
    with style():
        (axes,) = sweep.draw([panel], "ms_per_token", "lookahead").axes
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == [
        "greedy, large: 400.0", "async-chain, small > large, outcomes 0: 200.0 at 2"
    ]  # fmt: skip
    assert "auto" in labels[-1] and "150.0 at 3" in labels[-1].replace("\n", " ")

    (panel,) = sweep.read_panels(runs, "tokens_per_s", "outcomes")
    assert [[p.place for p in line.points] for line in panel.lines if not line.is_level] == [
        [0, 4], [4], [0]
    ]  # fmt: skip


def test_a_flag_in_a_flag_and_one_that_is_no_number(tmp_path: Path) -> None:
    for temperature, policy in ((0.0, "adaptive"), (0.7, "adaptive"), (0.7, "pipespec")):
        write_run(
            tmp_path / f"{temperature}{policy}.json",
            metadata(
                "async-chain", [SMALL, LARGE], 2,
                sampling={"temperature": temperature}, policy=policy,
            ),
            [sample(0, 1.0 + temperature, 10, [[9]])],
        )  # fmt: skip
    runs = read([tmp_path], sample_totals)
    (panel,) = sweep.read_panels(runs, "tokens_per_s", "sampling.temperature")
    assert [[p.place for p in line.points] for line in panel.lines] == [[0.0, 0.7], [0.7]]
    (panel,) = sweep.read_panels(runs, "tokens_per_s", "policy")
    with style():
        (axes,) = sweep.draw([panel], "tokens_per_s", "policy").axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["adaptive", "pipespec"]


def test_lengths_are_in_words_where_a_file_does_not_count_tokens(tmp_path: Path) -> None:
    results = [sample(i, 1.0, 4 + i, prompt="three short words") for i in range(2)]
    write_run(tmp_path / "a.json", metadata("greedy", [LARGE]), results)
    counted = [{**result, "num_prompt_tokens": 7} for result in results]
    write_run(tmp_path / "b.json", metadata("greedy", [SMALL]), counted)
    found = dataset_lengths.lengths_of_runs(read([tmp_path], dataset_lengths.text_of))
    assert [(lengths.of, lengths.unit, lengths.values) for lengths in found] == [
        ("prompt", "words", (3, 3)), ("output", "tokens", (4, 5)),
        ("prompt", "tokens", (7, 7)), ("output", "tokens", (4, 5)),
    ]  # fmt: skip


def test_the_prompts_of_a_data_set_are_counted_by_the_targets_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (3, 5)))
    flags = ["--dataset", rows, "--models-config-path", write_emulated(tmp_path)]
    options = dataset_lengths.make_lengths_parser().parse_args([str(flag) for flag in flags])
    assert dataset_lengths.lengths_of_dataset(options).values == (3, 5), "a token a byte"
    assert draw("dataset_lengths", *flags, "--output-dir", tmp_path, "--format", "svg") == 0
    assert capsys.readouterr().out == f"{tmp_path}/dataset-lengths.svg\n"
    for wrong in ([], [tmp_path, "--dataset", "stdlib"]):
        assert draw("dataset_lengths", *wrong) == 2
        assert "pass result files or --dataset" in capsys.readouterr().err


# -- labels -----------------------------------------------------------------------------------


def test_a_model_is_called_by_its_size_only_where_no_other_has_it() -> None:
    runs = [
        metadata("chain", ["JackFram/llama-68m", "org/Llama-2-7b-chat-hf"]),
        metadata("chain", ["org/Qwen2.5-0.5B-Instruct", "org/Mixtral-8x7B"]),
        metadata("greedy", ["org/Llama-3-8B"]),
        metadata("greedy", ["org/Llama-3.1-8B-Instruct", "org/target-3bit"]),
    ]
    assert short_names(runs) == {
        "llama-68m": "68M", "Llama-2-7b-chat-hf": "7B", "Qwen2.5-0.5B-Instruct": "0.5B",
        "Mixtral-8x7B": "8x7B", "Llama-3-8B": "8B", "target-3bit": "target-3bit",
    }  # fmt: skip
    assert short_names([runs[2], metadata("greedy", ["org/Llama-3.1-8B"])]) == {
        "Llama-3-8B": "Llama-3-8B", "Llama-3.1-8B": "Llama-3.1-8B",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "found"),
    [
        (["cuda:1", "cuda:3"], (1, 3)), ("cuda:2", (2,)), ("cuda", (0,)), ("auto", ()),
        (["cpu:0"], ()), (None, ()),
    ],
)  # fmt: skip
def test_the_devices_of_a_model_may_be_written_in_any_way(
    devices: Any, found: tuple[int, ...]
) -> None:
    """A greedy file of the original lists all models; the last one ran."""
    run = metadata("greedy", [SMALL, LARGE])
    run["model_configs"][-1]["devices"] = devices
    assert stage_devices(run) == (found,)


# -- the original's files ---------------------------------------------------------------------


@pytest.mark.shared_data
def test_the_lookahead_picture_has_the_published_minima() -> None:
    runs = read([PUBLISHED], sample_totals)
    assert len(runs) == 50
    panels = sweep.read_panels(runs, "ms_per_token", "lookahead")
    best = {
        line.label: min((p.value, p.place) for p in line.points)
        for panel in panels
        for line in panel.lines
    }
    assert best["greedy, 8B"][0] == pytest.approx(22.46, abs=0.005)
    assert best["greedy, 70B"][0] == pytest.approx(123.69, abs=0.005)
    for label, value, place in (
        ("chain, 1B > 8B", 18.30, 7), ("async-chain, 1B > 8B", 13.90, 3),
        ("chain, 1B > 70B", 84.72, 8), ("chain, 8B > 70B", 93.42, 8),
        ("chain, 1B > 8B > 70B", 90.14, 8), ("async-chain, 1B > 70B", 54.85, 0),
        ("async-chain, 8B > 70B", 54.52, 0), ("async-chain, 1B > 8B > 70B", 48.76, 0),
    ):  # fmt: skip
        assert best[label] == (pytest.approx(value, abs=0.005), place)


@pytest.mark.shared_data
def test_the_device_picture_has_the_published_energies() -> None:
    runs = read([PUBLISHED], gpu_stats.measured)
    found = {run.path.name: gpu_stats.usage(run).energy_per_token_j for run in runs}
    three = "Llama-3.2-1B-Instruct-Llama-3.1-8B-Instruct-Meta-Llama-3.1-70B-Instruct"
    for name, value in (
        ("greedy_Meta-Llama-3.1-70B-Instruct.json", 32.9),
        (f"chain_{three}_8.json", 40.4),
        (f"async-chain_{three}_0.json", 26.1),
    ):
        assert found[name] == pytest.approx(value, abs=0.06)
