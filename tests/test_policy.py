"""Waiting pays exactly where the study says: cheap drafts after a mismatch, never otherwise."""

from __future__ import annotations

import pytest

from pipespec.config import Schedule
from pipespec.policy import (
    AdaptiveWait,
    FixedWait,
    Situation,
    StepResult,
    StepTimes,
    expected_tokens,
    make_policy,
)
from pipespec.simulate import SimStage, Simulation
from pipespec.simulate.oracle import Oracle
from pipespec.simulate.scenario import Scenario
from pipespec.state import Role


def test_expected_tokens_counts_the_bonus_token() -> None:
    assert expected_tokens(0.0, 5) == 1.0
    assert expected_tokens(1.0, 5) == 6.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)


def test_step_times_interpolate_between_the_lengths_seen() -> None:
    times = StepTimes()
    assert times.estimate(3) is None
    times.observe(1, 1.0)
    times.observe(5, 3.0)
    assert times.estimate(3) == pytest.approx(2.0)
    assert times.estimate(9) == pytest.approx(3.0)


def test_the_original_policy_waits_for_nothing_beyond_its_lookahead() -> None:
    policy = make_policy(Schedule(policy="pipespec"), is_first=False)
    assert policy.wait(Situation(0, 10, 0.0))[0] == 0


def trained(acceptance: float, draft_s: float, step_s: float = 1.0) -> AdaptiveWait:
    """A policy that has seen a thousand steps of a pair like this."""
    policy, now_s = AdaptiveWait(16), 0.0
    num_accepted, carry = 0, 0.0
    for _ in range(1000):
        carry += acceptance / (1.0 - acceptance)
        num_accepted = min(4, int(carry))
        carry -= int(carry)
        policy.on_candidates(4, False, now_s + 4 * draft_s)
        now_s += 4 * draft_s + step_s
        policy.on_step(StepResult(5, 4, num_accepted + 1, False, step_s, now_s))
    return policy


def test_a_cheap_draft_is_waited_for_after_a_mismatch() -> None:
    wanted, patience_s = trained(0.7, draft_s=0.02).wait(Situation(0, 16, 0.0))
    assert 3 <= wanted <= 8
    assert patience_s is not None


def test_a_dear_draft_is_not_waited_for() -> None:
    assert trained(0.6, draft_s=0.6).wait(Situation(0, 16, 0.0))[0] == 0


def test_nothing_is_waited_for_once_enough_candidates_are_at_hand() -> None:
    assert trained(0.7, draft_s=0.1).wait(Situation(8, 16, 0.0))[0] == 8


def tokens_per_step_time(
    acceptance: float, draft_s: float, policy: AdaptiveWait | FixedWait, num_tokens: int = 3000
) -> float:
    """Throughput of a simulated pair in target steps, greedy being 1."""
    scenario = Scenario.random(3)
    submit = scenario.submits()[0]
    submit = type(submit)(1, submit.prompt, (), submit.sampling, num_tokens, (), ())
    stages = [
        SimStage(
            lambda: Role(0, 2, 16, 16), lambda: FixedWait(0, None), lambda _: draft_s,
            Oracle(acceptance, 4096),
        ),
        SimStage(
            lambda: Role(1, 2, 16, 16), lambda: policy, lambda q: 1.0 + 0.04 * max(0, q - 6),
            Oracle(1.0, 4096),
        ),
    ]  # fmt: skip
    report = Simulation(stages, [submit], latency_s=1e-4, verify=False).run()
    return num_tokens / report.end_s


@pytest.mark.parametrize(("acceptance", "draft_s"), [(0.6, 0.03), (0.7, 0.1), (0.8, 0.05)])
def test_adaptive_waiting_beats_verifying_whatever_is_there_when_drafts_are_cheap(
    acceptance: float, draft_s: float
) -> None:
    original = tokens_per_step_time(acceptance, draft_s, FixedWait(0, 1.0))
    adaptive = tokens_per_step_time(acceptance, draft_s, AdaptiveWait(16))
    assert adaptive > 1.1 * original


@pytest.mark.parametrize("acceptance", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("draft_s", [0.02, 0.1, 0.2, 0.5])
def test_adaptive_waiting_comes_within_five_percent_of_the_best_fixed_wait(
    acceptance: float, draft_s: float
) -> None:
    adaptive = tokens_per_step_time(acceptance, draft_s, AdaptiveWait(16))
    best = max(
        tokens_per_step_time(acceptance, draft_s, FixedWait(n, None)) for n in (0, 1, 2, 4, 6, 8)
    )
    assert adaptive > 0.95 * best
