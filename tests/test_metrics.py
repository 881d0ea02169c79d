"""Metrics: hand-made numbers with known answers, and the published results of the original."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipespec.errors import ProtocolError
from pipespec.metrics import (
    StageCounts,
    energy_estimate_j,
    sample_metrics,
    sample_totals,
    speed_up,
    summarise,
)
from pipespec.metrics import definitions as define
from pipespec.results import load_results
from pipespec.state.counts import Counts

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "pipespec_results"
SMALL, MIDDLE = "Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct"
LARGE = "Meta-Llama-3.1-70B-Instruct"

# ms per token of the 1B-8B pair, lookahead 1 to 20 and 0 to 20.
CHAIN_MS = (
    "34.84 25.21 21.39 20.03 19.28 18.60 18.30 18.66 18.62 18.71 "
    "19.18 18.91 19.67 18.96 20.26 20.60 21.09 21.55 21.83 22.36"
)
ASYNC_CHAIN_MS = (
    "14.53 14.44 14.26 13.90 15.38 14.48 15.73 15.99 16.58 16.26 17.35 "
    "17.34 18.50 18.10 19.23 19.24 20.06 22.25 22.74 23.10 22.02"
)


def stage(**values: Any) -> StageCounts:
    """Counters of a stage of which only some matter."""
    lists = ("step_times_s", "query_lengths", "offered", "accepted", "emitted")
    num_steps = max((len(values.get(name, ())) for name in lists), default=0)
    full: dict[str, Any] = {name: [0] * num_steps for name in lists}
    full |= dict.fromkeys(("num_prefill_tokens", "num_drafted", "num_stale_drafts"), 0)
    full |= dict.fromkeys(("num_rolled_back", "num_discarded_steps"), 0)
    full |= dict.fromkeys(("prefill_s", "wait_s", "forward_s"), 0.0)
    return StageCounts.from_values({**full, "num_steps": num_steps, **values})


DRAFT = stage(
    step_times_s=[0.1] * 5, query_lengths=[1] * 5, emitted=[1] * 5, num_drafted=12,
    num_rolled_back=2, num_rollbacks=1, num_past_end=1, prefill_s=0.2, forward_s=0.7,
)  # fmt: skip
TARGET = stage(
    step_times_s=[1.0, 1.0, 1.0], query_lengths=[5, 3, 5], offered=[4, 2, 4], accepted=[4, 1, 2],
    emitted=[5, 2, 2], prefill_s=0.5, forward_s=3.5, wait_s=0.3, num_drafted=10,
    num_stale_drafts=3, step_starts_s=[10.5, 12.0, 13.5],
)  # fmt: skip


def two_stage_metrics() -> dict[str, Any]:
    return sample_metrics(
        "async-chain",
        [DRAFT, TARGET],
        total_time_s=5.0,
        time_to_first_token_s=0.6,
        num_tokens=10,
        started_s=10.0,
    )


def result(index: int, metrics: dict[str, Any], text: str = "out", prompt: str = "in") -> Any:
    return {"sample_index": index, "metrics": metrics, "output_text": text, "input_text": prompt}


def timed(index: int, seconds: float, num_tokens: int, **more: str) -> Any:
    metrics = {"token_times": [0.1] * (num_tokens - 1), "total_time": seconds}
    return result(index, {**metrics, "tokens_generated": num_tokens}, **more)


# -- definitions ------------------------------------------------------------------------------


def test_each_definition_gives_what_its_formula_says() -> None:
    assert define.time_per_token(5.0, 10) == 0.5
    assert define.tokens_per_second(5.0, 10) == 2.0
    assert define.speed_up_ratio(0.5, 0.2) == 2.5
    assert define.acceptance_rate(7, 10) == 0.7
    assert define.mean_accepted_length(7, 3) == pytest.approx(7 / 3)
    assert define.block_efficiency(9, 3) == 3.0
    assert define.token_wastage(2, 1, 12) == 0.25
    assert define.token_wastage(20, 1, 12) == 1.0
    assert define.efficiency_gain(10, 4) == 2.5
    assert define.overhead(5.0, 3.5) == pytest.approx(0.3)
    assert define.overhead(5.0, 5.1) == 0.0
    assert define.energy_per_token(30.0, 10) == 3.0


def test_energy_is_the_mean_power_of_the_gpus_in_use_times_the_time() -> None:
    means_w = [150.0, 50.0, 999.0, None]
    assert define.energy_from_power(means_w, [0, 1], 2.0) == 400.0
    for gpus in ([], [3], [0, 4]):
        assert define.energy_from_power(means_w, gpus, 2.0) is None


def test_energy_is_estimated_from_what_was_read_of_each_gpu() -> None:
    """A GPU that disappears meanwhile counts with what was read of it; one without a reading leaves
    nothing to estimate from."""
    stats = [{"gpu_powers": [100.0, 50.0, None]}, {"gpu_powers": [200.0, None, None]}, {"x": 1}]
    results = [{**timed(0, 2.0, 10), "gpustats": stats}, {**timed(1, 1.0, 10), "gpustats": stats}]
    assert energy_estimate_j(results, [0]) == 450.0
    assert energy_estimate_j(results, [0, 1]) == 600.0
    assert energy_estimate_j(results, [0, 2]) is None
    assert energy_estimate_j([*results, timed(2, 1.0, 10)], [0]) is None
    assert sample_totals(results[0]).gpu_powers_w == (150.0, 50.0, None)


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3))
def test_nothing_counted_is_none_and_nothing_is_ever_nan(numbers: list[int]) -> None:
    a, b, c = numbers
    values = [
        define.time_per_token(a, b), define.tokens_per_second(a, b), define.speed_up_ratio(a, b),
        define.acceptance_rate(a, b), define.mean_accepted_length(a, b),
        define.block_efficiency(a, b), define.token_wastage(a, c, b),
        define.efficiency_gain(a, b), define.overhead(a, b), define.energy_per_token(a, b),
    ]  # fmt: skip
    assert all(value is None or math.isfinite(value) for value in values)


# -- what a stage counted ---------------------------------------------------------------------


def test_counts_survive_the_wire() -> None:
    counts = stage(emitted=[1, 1], step_times_s=[0.5, 1], num_overflows=3)
    assert counts.extra == {"num_overflows": 3}
    packed = msgpack.unpackb(msgpack.packb(counts.to_values()))
    assert StageCounts.from_values(packed) == counts


def test_what_the_state_machine_counts_is_what_metrics_read() -> None:
    counts = StageCounts.from_values(Counts().to_values())
    assert counts.num_steps == 0
    assert StageCounts.from_values(counts.to_values()) == counts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_drafted", -1), ("num_drafted", 1.0), ("num_drafted", True), ("num_drafted", "1"),
        ("wait_s", -0.1), ("wait_s", float("nan")), ("wait_s", None), ("step_times_s", [-1.0]),
        ("step_times_s", [1.0, 2.0]), ("step_times_s", 3), ("emitted", [0.5]), ("emitted", {}),
        ("accepted", [2]), ("emitted", [3]), ("emitted", [0]), ("anything_else", [1]),
        ("anything_else", float("inf")), ("step_starts_s", [1.0, 2.0]),
    ],
)  # fmt: skip
def test_a_wrong_counter_is_a_protocol_error(name: str, value: Any) -> None:
    good = stage(offered=[1], accepted=[1], emitted=[1], step_times_s=[0.1]).to_values()
    with pytest.raises(ProtocolError, match=r"^Stats"):
        StageCounts.from_values({**good, name: value})


def test_a_missing_counter_is_named() -> None:
    values = stage().to_values()
    del values["wait_s"], values["num_drafted"]
    with pytest.raises(ProtocolError, match="Stats lacks num_drafted, wait_s"):
        StageCounts.from_values(values)


# -- one sample -------------------------------------------------------------------------------


def test_a_sample_has_the_originals_keys_first_and_in_its_order() -> None:
    keys = list(two_stage_metrics())
    shared = ["total_time", "tokens_generated", "time_per_token"]
    assert keys[:5] == ["model_times", "accepted_tokens", *shared]
    greedy = sample_metrics(
        "greedy",
        [stage(step_times_s=[0.1, 0.2], emitted=[1, 1])],
        total_time_s=0.5,
        time_to_first_token_s=0.2,
        num_tokens=3,
    )
    assert list(greedy)[:4] == ["token_times", *shared]
    assert greedy["token_times"] == [0.1, 0.2]
    assert greedy["acceptance_rate"] == []
    assert greedy["efficiency_gain"] == 1.0


def test_accepted_tokens_count_the_bonus_and_add_up_to_the_text() -> None:
    metrics = two_stage_metrics()
    assert metrics["accepted_tokens"] == [[5, 2, 2]]
    assert 1 + sum(metrics["accepted_tokens"][-1]) == metrics["tokens_generated"]


def test_a_samples_rates_follow_from_its_counts() -> None:
    metrics = two_stage_metrics()
    assert metrics["acceptance_rate"] == [0.7]
    assert metrics["mean_accepted_length"] == [pytest.approx(7 / 3)]
    assert metrics["block_efficiency"] == [3.0]
    assert metrics["token_wastage"] == [0.25]
    assert metrics["num_target_forwards"] == 4
    assert metrics["efficiency_gain"] == 2.5
    assert metrics["overhead"] == pytest.approx(0.3)
    assert metrics["num_stale_drafts"] == [0, 3]
    assert metrics["prefill_times_s"] == [0.2, 0.5]
    assert metrics["model_starts"][1] == [0.5, 2.0, 3.5]
    assert "counters" not in metrics
    json.dumps(metrics, allow_nan=False)


def test_a_step_that_a_verdict_overtook_counts_in_no_rate() -> None:
    middle = stage(
        step_times_s=[1.0, 1.0], query_lengths=[5, 5], offered=[4, 4], accepted=[2, 0],
        emitted=[3, 0], num_discarded_steps=1,
    )  # fmt: skip
    metrics = sample_metrics(
        "async-chain",
        [DRAFT, middle, TARGET],
        total_time_s=5.0,
        time_to_first_token_s=0.6,
        num_tokens=10,
    )
    assert metrics["accepted_tokens"][0] == [3, 0]
    assert metrics["acceptance_rate"] == [0.5, 0.7]
    assert metrics["block_efficiency"] == [3.0, 3.0]
    assert metrics["num_verifications"] == [1, 3]


def test_a_one_token_text_has_no_rates_and_no_division_by_zero() -> None:
    metrics = sample_metrics(
        "chain", [stage(), stage()], total_time_s=0.0, time_to_first_token_s=0.0, num_tokens=1
    )
    rates = ("acceptance_rate", "mean_accepted_length", "block_efficiency", "token_wastage")
    assert [metrics[name] for name in rates] == [[None]] * 4
    assert metrics["overhead"] is None
    assert metrics["efficiency_gain"] == 1.0
    summary = summarise([result(0, metrics)])
    assert summary.acceptance_rate == (None,)
    assert summary.tokens_per_s is None


# -- runs -------------------------------------------------------------------------------------


def test_a_run_divides_sums_by_sums() -> None:
    summary = summarise([timed(0, 1.0, 1), timed(1, 1.0, 9)])
    assert summary.num_tokens == 10
    assert summary.ms_per_token == 200.0
    assert summary.tokens_per_s == 5.0
    assert summary.acceptance_rate == ()
    assert summary.overhead is None  # a file of the original says nothing about it
    assert summary.efficiency_gain == 1.0


def test_a_run_of_one_sample_has_that_samples_rates() -> None:
    metrics = {**two_stage_metrics(), "energy_j": 30.0}
    summary = summarise([result(0, metrics)])
    for name in ("acceptance_rate", "mean_accepted_length", "block_efficiency", "token_wastage"):
        assert list(getattr(summary, name)) == metrics[name]
    for name in ("num_target_forwards", "efficiency_gain", "overhead", "time_to_first_token_s"):
        assert getattr(summary, name) == metrics[name]
    assert summary.energy_per_token_j == 3.0


def test_an_empty_run_is_summarised_without_a_rate() -> None:
    values = asdict(summarise([]))
    assert {value for value in values.values() if value not in (0, ())} == {None}


def test_speed_up_is_taken_over_the_prompts_that_both_runs_have() -> None:
    greedy = [timed(0, 10.0, 10), timed(1, 10.0, 10, prompt="other"), timed(2, 10.0, 10)]
    run = [timed(0, 4.0, 10), timed(1, 1.0, 10), timed(2, 6.0, 10, text="new"), timed(3, 1.0, 10)]
    comparison = speed_up(run, greedy)
    assert comparison.num_matched == 2
    assert comparison.speed_up == 2.0
    assert comparison.differing == (2,)
    assert comparison.num_same_text == 1


def test_runs_without_a_common_prompt_have_no_speed_up() -> None:
    comparison = speed_up([timed(0, 1.0, 10)], [timed(1, 1.0, 10)])
    assert comparison.speed_up is None
    assert comparison.num_matched == 0


# -- the published files ----------------------------------------------------------------------


@cache
def published(name: str) -> Any:
    return load_results(PUBLISHED / f"{name}.json")


def published_names() -> Iterator[str]:
    return (path.stem for path in sorted(PUBLISHED.glob("*.json")))


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "greedy", "ms_per_token", "published_speed_up", "matched_speed_up"),
    [
        (f"greedy_{SMALL}", SMALL, 11.72, 1, 1),
        (f"greedy_{MIDDLE}", MIDDLE, 22.46, 1, 1),
        (f"greedy_{LARGE}", LARGE, 123.69, 1, 1),
        (f"chain_{SMALL}-{LARGE}_8", LARGE, 84.72, 1.460, 1.471),
        (f"chain_{MIDDLE}-{LARGE}_8", LARGE, 93.42, 1.324, 1.321),
        (f"chain_{SMALL}-{MIDDLE}-{LARGE}_8", LARGE, 90.14, 1.372, 1.374),
        (f"async-chain_{SMALL}-{LARGE}_0", LARGE, 54.85, 2.255, 2.343),
        (f"async-chain_{MIDDLE}-{LARGE}_0", LARGE, 54.52, 2.269, 2.330),
        (f"async-chain_{SMALL}-{MIDDLE}-{LARGE}_0", LARGE, 48.76, 2.537, 2.636),
        (f"chain_{SMALL}-{MIDDLE}_7", MIDDLE, 18.30, 1.227, 1.227),
        (f"async-chain_{SMALL}-{MIDDLE}_3", MIDDLE, 13.90, 1.615, 1.615),
    ],
)
def test_published_numbers_come_out(
    name: str, greedy: str, ms_per_token: float, published_speed_up: float, matched_speed_up: float
) -> None:
    run, baseline = published(name).results, published(f"greedy_{greedy}").results
    summary, greedy_summary = summarise(run), summarise(baseline)
    assert summary.ms_per_token == pytest.approx(ms_per_token, abs=0.006)
    assert summary.time_per_token_s is not None
    assert greedy_summary.time_per_token_s is not None
    quotient = greedy_summary.time_per_token_s / summary.time_per_token_s
    assert quotient == pytest.approx(published_speed_up, abs=6e-4)
    comparison = speed_up(run, baseline)
    assert comparison.num_matched == 10
    assert comparison.speed_up == pytest.approx(matched_speed_up, abs=6e-4)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("strategy", "first", "sweep"),
    [
        ("chain", 1, CHAIN_MS),
        ("async-chain", 0, ASYNC_CHAIN_MS),
    ],
)
def test_the_published_lookahead_sweeps_come_out(strategy: str, first: int, sweep: str) -> None:
    for lookahead, ms_per_token in enumerate(map(float, sweep.split()), first):
        results = published(f"{strategy}_{SMALL}-{MIDDLE}_{lookahead}").results
        assert summarise(results).ms_per_token == pytest.approx(ms_per_token, abs=0.006)


@pytest.mark.shared_data
def test_every_published_file_is_read_and_summarised() -> None:
    names = list(published_names())
    assert len(names) == 50
    for name in names:
        file = published(name)
        summary = summarise(file.results)
        assert summary.num_samples == file.metadata["num_samples"]
        num_pairs = max(0, len(file.metadata["model_configs"]) - 1)
        assert len(summary.block_efficiency) == num_pairs
        for length, efficiency in zip(summary.mean_accepted_length, summary.block_efficiency):
            assert length is not None
            assert efficiency == pytest.approx(length + 1)
        assert summary.acceptance_rate == (None,) * num_pairs  # the original did not log offers
        assert summary.efficiency_gain is not None
        assert summary.efficiency_gain >= 1.0


@pytest.mark.shared_data
def test_texts_that_fp16_changed_are_found() -> None:
    run = published(f"chain_{MIDDLE}-{LARGE}_8").results
    comparison = speed_up(run, published(f"greedy_{LARGE}").results)
    assert comparison.num_same_text == 9


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "gpus", "joules_per_token"),
    [
        (f"greedy_{LARGE}", [1, 2], 32.9),
        (f"chain_{SMALL}-{MIDDLE}-{LARGE}_8", [0, 1, 2, 3], 40.4),
        (f"async-chain_{SMALL}-{MIDDLE}-{LARGE}_0", [0, 1, 2, 3], 26.1),
    ],
)
def test_published_energy_comes_out(name: str, gpus: list[int], joules_per_token: float) -> None:
    results = published(name).results
    energy_j = energy_estimate_j(results, gpus)
    assert energy_j is not None
    per_token_j = define.energy_per_token(energy_j, summarise(results).num_tokens)
    assert per_token_j == pytest.approx(joules_per_token, rel=0.005)
