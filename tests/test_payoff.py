"""Which stages of a run paid: simulated runs whose answer is known stand for measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pipespec.commands.payoff import LEAST_TOKENS, is_enough, payoff_line, payoff_metadata
from pipespec.config import ModelConfig, Schedule
from pipespec.emulation import parse_emulation
from pipespec.metrics import StageCounts
from pipespec.planning.payoff import (
    MIN_GAIN,
    Payoff,
    WrittenText,
    acceptance,
    agreement,
    payoff,
    step_times,
)
from pipespec.simulate.prediction import Prediction, Workload, predict
from pipespec.state.counts import Counts

NAMES = ("draft", "middle", "target")

USELESS_MIDDLE = (
    {"step_ms": {"1": 1}, "agreement": 0.8},
    {"step_ms": {"1": 30}, "agreement": 0.98},
    {"step_ms": {"1": 20}},
)
DRAFT_THAT_NEVER_AGREES = (
    {"step_ms": {"1": 1}, "agreement": 0.0},
    {"step_ms": {"1": 6, "8": 48}, "agreement": 0.9},
    {"step_ms": {"1": 20}},
)
ALL_PAY = (
    {"step_ms": {"1": 1}, "agreement": 0.8},
    {"step_ms": {"1": 6}, "agreement": 0.95},
    {"step_ms": {"1": 50}},
)
SLOW_DRAFT = (
    {"step_ms": {"1": 20}, "agreement": 0.3},
    {"step_ms": {"1": 20, "2": 40}},
)


def simulated(models: Sequence[dict[str, Any]], schedule: Schedule) -> Prediction:
    names = NAMES[-len(models) :]
    emulations = [parse_emulation(values, name) for name, values in zip(names, models)]
    workload = Workload(num_texts=4, prompt_tokens=30, new_tokens=64)
    strategy = "async-chain" if len(models) > 1 else "greedy"
    return predict([*zip(names, emulations)], strategy, schedule, workload)


def texts_of(run: Prediction) -> list[WrittenText]:
    """As if the run had been measured."""
    texts = list(zip(*run.stages))
    return [WrittenText(counts, run.total_s / len(texts)) for counts in texts]


@pytest.mark.parametrize(
    ("models", "schedule", "not_paying"),
    [
        (USELESS_MIDDLE, Schedule(), (1,)),
        (DRAFT_THAT_NEVER_AGREES, Schedule(lookahead=3, outcomes=0), (0,)),
        (ALL_PAY, Schedule(), ()),
        (SLOW_DRAFT, Schedule(lookahead=3), (0,)),
    ],
    ids=["useless-middle", "draft-never-agrees", "all-pay", "slow-draft"],
)
def test_stages_that_do_not_pay_are_found(
    models: Sequence[dict[str, Any]], schedule: Schedule, not_paying: tuple[int, ...]
) -> None:
    run = simulated(models, schedule)
    found = payoff(texts_of(run), schedule)
    for stages, speed in found.tokens_per_s.items():
        really = simulated([models[stage] for stage in stages], schedule).tokens_per_s
        print(stages, f"{speed:.1f} tokens/s, really {really:.1f}")
        assert speed < 1.25 * really  # it may promise less, where something was not measured
    assert found.not_paying == not_paying
    best = simulated([models[stage] for stage in found.best], schedule)
    assert (best.tokens_per_s > (1 + MIN_GAIN) * run.tokens_per_s) is bool(not_paying)


def counts(**values: Any) -> StageCounts:
    """Of a text with one step for each item of its lists."""
    emitted = values.get("emitted", values.get("query_lengths", ()))
    lists = dict.fromkeys(("step_times_s", "query_lengths", "offered", "accepted", "emitted"))
    given = {name: [0] * len(emitted) for name in lists} | {"num_steps": len(emitted)}
    return StageCounts.from_values(Counts().to_values() | given | values)


def test_a_longer_forward_never_takes_less_than_a_shorter_one() -> None:
    """Of 2 tokens 10 and 20 ms, of 3 tokens 12 ms: both have the median of all three."""
    stage = counts(
        query_lengths=[1, 2, 2, 3, 8],
        step_times_s=[0.006, 0.010, 0.020, 0.012, 0.015],
        num_prefill_tokens=40,
        prefill_s=0.055,
    )
    times = step_times([stage], default_s=1.0)
    found = [1e3 * times.forward_s(length, context=0) for length in (1, 2, 3, 8, 24, 40, 500)]
    assert found == pytest.approx([6.0, 12.0, 12.0, 15.0, 35.0, 55.0, 55.0])
    assert step_times([counts(emitted=[])], default_s=1.0).forward_s(3, context=0) == 1.0


def test_only_candidates_after_accepted_ones_say_how_often_one_is_accepted() -> None:
    """Three of them accepted and then one rejected; all two accepted; a text that ended before the
    first rejection; a step that a verdict overtook."""
    stage = counts(offered=[8, 2, 8, 5], accepted=[3, 2, 1, 0], emitted=[4, 3, 1, 0])
    assert acceptance([stage]) == pytest.approx(6 / 7)
    assert acceptance([counts(offered=[0], emitted=[1])]) == 0.0


def test_stages_that_are_no_neighbours_agree_less_often_than_neighbours() -> None:
    assert agreement([0.7]) == 0.7
    assert agreement([0.7, 0.75]) == pytest.approx(0.665)
    assert agreement([0.7, 0.99]) == pytest.approx(0.693)
    assert agreement([0.9, 0.5, 0.9]) == pytest.approx(0.45125)


def test_a_stage_that_gains_little_stays() -> None:
    """What is nearer than `MIN_GAIN` to the speed of all stages is as good."""
    whole, pair, alone = (0, 1, 2), (0, 2), (2,)
    assert Payoff({whole: 100.0, pair: 104.0, alone: 50.0}, 99).not_paying == ()
    assert Payoff({whole: 100.0, pair: 106.0, alone: 50.0}, 99).not_paying == (1,)
    assert Payoff({whole: 100.0, pair: 106.0, alone: 107.0}, 99).not_paying == (0, 1)


# What is said about it

MODELS = tuple(ModelConfig(f"some/{name}", ("cpu",)) for name in NAMES)


def greedy_results(*speeds: float) -> list[dict[str, Any]]:
    """One sample each, of 64 tokens."""
    return [
        {
            "sample_index": index,
            "metrics": {"tokens_generated": 64, "total_time": 64 / speed, "token_times": []},
            "input_text": "",
            "output_text": "",
        }
        for index, speed in enumerate(speeds)
    ]


def test_a_stage_that_does_not_pay_is_named_with_what_is_gained_without_it() -> None:
    found = {
        "samples": [0, 1],
        "tokens_per_s": 980.2,
        "alternatives": [
            {"stages": [0, 2], "tokens_per_s": 1210.4},
            {"stages": [2], "tokens_per_s": 1300.0},
        ],
        "greedy_is_measured": True,
        "not_paying": [1],
        "best": [0, 2],
        "dropped": [],
    }
    line = "middle does not pay: without it about 1,210 instead of 980 tokens/s (simulated from "
    line += "this run); "
    assert payoff_line(found, MODELS) == line + "--drop-stages leaves it out"
    found["dropped"] = [1]
    assert payoff_line(found, MODELS) == line + "left out after the first 2 samples"
    found |= {"not_paying": [0, 1], "best": [2], "dropped": []}
    assert payoff_line(found, MODELS) == (
        "draft and middle do not pay: the target alone (greedy) has about 1,300 instead of 980 "
        "tokens/s (measured); --drop-stages leaves them out"
    )
    found |= {"not_paying": [], "best": [0, 1, 2]}
    assert payoff_line(found, MODELS) is None
    assert payoff_line(None, MODELS) is None


def test_greedys_own_speed_counts_if_it_wrote_the_samples_of_the_run() -> None:
    """A target whose forwards are slowed down by its drafts is faster than the run can know."""
    run = simulated(SLOW_DRAFT, Schedule())
    texts = dict(enumerate(texts_of(run)))
    for num_greedy, is_measured in ((3, False), (4, True), (5, True)):
        greedy = greedy_results(*[900.0] * num_greedy)
        found = payoff_metadata(texts, Schedule(), greedy, drops=False)
        (alone,) = found["alternatives"]
        assert found["greedy_is_measured"] is is_measured
        assert (alone["tokens_per_s"] == 900.0) is is_measured
        assert found["not_paying"] == ((0,) if is_measured else ())
        assert found["samples"] == [0, 1, 2, 3]
        assert found["dropped"] == ()


def test_a_short_run_says_nothing() -> None:
    ones = [1] * (LEAST_TOKENS // 2 - 1)  # and one more token of the prefill
    text = WrittenText((counts(emitted=ones),), 1.0)
    assert not is_enough({0: text})
    assert is_enough({0: text, 1: text})
