"""A target leaves its drafts while they only slow it down, and comes back when they pay."""

from __future__ import annotations

from collections.abc import Callable

from pipespec.config import SamplingParams, Schedule
from pipespec.emulation import Oracle
from pipespec.messages import Submit
from pipespec.policy import StepResult
from pipespec.simulate.prediction import Prediction, SimModel, predict_texts
from pipespec.solo import Solo

LEAST_S = 0.9
Rate = Callable[[int], float]  # tokens a second at a step


def run(num_steps: int, together: Rate, alone: Rate, solo: Solo | None = None) -> list[bool]:
    """Whether the target was alone at each step of one text."""
    solo, now_s, found = solo or Solo(), 0.0, []
    for step in range(num_steps):
        found.append(solo.is_alone)
        rate = alone(step) if solo.is_alone else together(step)
        now_s += 1.0 / rate
        solo.on_step(result(now_s), LEAST_S)
    return found


def result(end_s: float, *, is_prefill: bool = False) -> StepResult:
    return StepResult(1, 0, 0, 1, 0, is_prefill, 1.0, end_s)


def test_who_is_faster_than_any_step_alone_never_tries_it() -> None:
    assert not any(run(5000, lambda _: 1.2, lambda _: 1.0))


def test_who_might_be_faster_alone_tries_and_comes_back() -> None:
    found = run(5000, lambda _: 1.05, lambda _: 1.0)
    assert 0 < sum(found) < 150, "a trial now and then"
    assert not found[-1]


def test_who_is_faster_alone_stays_so_but_for_ever_rarer_trials() -> None:
    found = run(10_000, lambda _: 0.7, lambda _: 1.0)
    assert sum(found[:200]) > 60
    assert sum(found[2000:]) > 0.97 * 8000
    assert not all(found[2000:]), "it looks whether they pay by now"


def test_drafts_that_pay_later_are_back_soon_after() -> None:
    found = run(10_000, lambda step: 0.7 if step < 3000 else 1.5, lambda _: 1.0)
    assert all(found[2900:3000])
    assert not any(found[4200:])


def test_time_between_texts_is_no_part_of_a_measurement() -> None:
    solo, now_s = Solo(), 0.0
    for _ in range(40):
        now_s += 1000.0
        solo.on_step(result(now_s, is_prefill=True), LEAST_S)
        for _ in range(20):
            now_s += 0.8
            solo.on_step(result(now_s), LEAST_S)
            assert not solo.is_alone


def predicted(agreement: float, between_s: float, *, is_alone_allowed: bool = True) -> Prediction:
    """A fast draft whose target's loop takes `between_s` for each step."""
    models = [
        SimModel(lambda count, _: 0.1, Oracle(agreement, 50, 1), num_tail_rows=384),
        SimModel(lambda count, _: 1.0 + 0.1 * (count - 1), Oracle(1.0, 50, 1), between_s),
    ]
    submits = [Submit(0, (1, 2, 3), (), SamplingParams(), 900, (), ())]
    schedule = Schedule() if is_alone_allowed else Schedule("pipespec", 0)
    return predict_texts(models, "async-chain", schedule, submits, latency_s=0.05)


def test_a_pipeline_of_a_useless_draft_is_about_as_fast_as_its_target() -> None:
    useless = predicted(0.02, 0.0)
    assert useless.tokens_per_s > 0.95, "a target alone has 1"
    original = predicted(0.02, 0.0, is_alone_allowed=False)
    assert useless.outputs == original.outputs
    num_steps = [sum(text.num_steps for text in run.stages[0]) for run in (useless, original)]
    assert num_steps[0] < 0.5 * num_steps[1], "most of the time it has nothing to do"


def test_a_draft_that_pays_is_kept() -> None:
    assert predicted(0.8, 0.0).tokens_per_s > 2.0


def test_a_slow_loop_alone_is_no_reason_to_leave_a_draft_that_pays() -> None:
    assert predicted(0.8, 0.3).tokens_per_s > 1.8
