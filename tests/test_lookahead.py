"""A synchronous chain finds its lookahead on a machine that is never equally fast for long."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipespec.config import Schedule
from pipespec.emulation import Oracle
from pipespec.estimates import CycleTimes
from pipespec.lookahead import AdaptiveLookahead
from pipespec.policy import FixedWait, Situation, StepResult, make_policy
from pipespec.simulate import SimStage, Simulation
from pipespec.simulate.scenario import Scenario
from pipespec.state import Role


class Machine:
    """Forwards take what they take, but all of them more for some ten cycles, and now and then one
    that another process interrupts: as measured on two shared cores.

    quiet_s: what they would have taken without, so that luck does not decide.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._pace = 1.0
        self.quiet_s = 0.0

    def forward(self, seconds: float) -> float:
        self.quiet_s += seconds
        if self._rng.random() < 0.02:
            self._pace = self._rng.uniform(0.8, 1.3)
        return seconds * (3.0 if self._rng.random() < 0.02 else self._pace)


def chain_rate(
    lookahead: int | None,
    acceptance: float,
    draft_s: float,
    step_s: Callable[[int], float],
    seed: int = 0,
) -> float:
    """Tokens per second of a chain on a quiet machine, if it does as it does on a noisy one."""
    machine, num_tokens = Machine(seed), 2500
    submit = replace(Scenario.random(3).submits()[0], max_new_tokens=num_tokens, eos=())
    ahead = lookahead or 16
    policy = make_policy(Schedule(lookahead=lookahead), is_first=False, overlaps=False)
    stages = [
        SimStage(
            lambda: Role(0, 2, ahead, ahead), lambda: FixedWait(0, None),
            lambda _: machine.forward(draft_s), Oracle(acceptance, 4096), between_s=0.1,
        ),
        SimStage(
            lambda: Role(1, 2, ahead, ahead), lambda: policy,
            lambda length: 0.2 + machine.forward(step_s(length)), Oracle(1.0, 4096), between_s=0.1,
        ),
    ]  # fmt: skip
    report = Simulation(stages, [submit], in_turn=True, verify=False).run()
    num_cycles = sum(values["num_steps"] for (stage, _), values in report.stats.items() if stage)
    return num_tokens / (machine.quiet_s + 0.4 * num_cycles)


@pytest.mark.parametrize(
    ("acceptance", "draft_s", "slope", "best"),
    [(0.5, 0.09, 0.04, 2), (0.7, 0.09, 0.04, 5), (0.85, 0.09, 0.04, 8), (0.85, 0.02, 0.0, 12)],
)
def test_noise_costs_no_more_than_five_percent_of_the_best_fixed_lookahead(
    acceptance: float, draft_s: float, slope: float, best: int
) -> None:
    def step_s(length: int) -> float:
        return 1.15 + slope * length

    fixed = chain_rate(best, acceptance, draft_s, step_s)
    for seed in (0, 1):
        assert chain_rate(None, acceptance, draft_s, step_s, seed) > 0.95 * fixed


def test_what_a_candidate_costs_is_told_from_a_machine_that_is_slow_meanwhile() -> None:
    """More candidates were drafted nearly whenever all took 1.4 times as long; a line through the
    times as they are makes 8 of them cost 4.8 cycles instead of half a cycle."""
    times = CycleTimes()
    for cycle in range(400):
        is_slow = cycle % 80 < 40
        num = 6 if ((cycle - 5) % 80 < 40) != (cycle % 8 == 0) else 4
        times.observe(num, (1.5 + 0.1 * num) * (1.4 if is_slow else 1.0))
    assert times.estimate(8) / times.estimate(0) == pytest.approx(2.3 / 1.5, rel=0.25)


def test_a_chain_that_meets_bad_drafts_still_drafts_one_token() -> None:
    policy = AdaptiveLookahead(8)
    for step in range(1, 32):
        result = StepResult(2, 1, 0, 1, 0, False, 0.5, float(step), 1.0)
        policy.on_step(result)
    assert policy.wait(Situation(0, 8, 41.0)) == (1, None)


def test_the_first_cycle_of_a_text_tells_nothing_because_drafts_read_the_prompt() -> None:
    policies = AdaptiveLookahead(16), AdaptiveLookahead(16)
    for policy, first_s in zip(policies, (1.0, 50.0)):
        for _ in range(40):
            policy.on_step(StepResult(64, 0, 0, 1, 0, True, 1.0, 0.0, 1.0))
            policy.on_step(StepResult(5, 4, 3, 4, 0, False, 1.0, 0.0, first_s))
            policy.on_step(StepResult(5, 4, 3, 4, 0, False, 1.0, 0.0, 2.0))
    assert policies[0].wait(Situation(0, 16, 0.0)) == policies[1].wait(Situation(0, 16, 0.0))
