"""Random pipelines from a seed: what the property tests run thousands of."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pipespec.config import SamplingParams
from pipespec.emulation import Oracle
from pipespec.lookahead import AdaptiveLookahead
from pipespec.messages import Submit
from pipespec.policy import AdaptiveWait, FixedWait, Policy, Situation, StepResult
from pipespec.simulate.engine import Simulation
from pipespec.simulate.setup import Faults, Report, SimStage
from pipespec.state.outcomes import Budget
from pipespec.state.step import Role

VOCAB_SIZE = 4  # few tokens: wrong branches meet right ones by chance, again and again
RELIABLE = Faults()
CRASHES = Faults(num_crashes=4, stalls=0.04)
LOSSY = Faults(loss=0.04, duplication=0.04, reordering=0.05)
EVERYTHING = Faults(num_crashes=3, stalls=0.02, loss=0.03, duplication=0.03, reordering=0.04)
UNEQUAL = Faults(num_crashes=4, stalls=0.04, unequal_target=True)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One random pipeline and its requests. Lists have one item a stage, first draft first."""

    seed: int
    agreement: tuple[float, ...]
    run_ahead: tuple[int, ...]
    wait: tuple[int, ...]
    batch: int
    step_s: tuple[float, ...]
    slope: float
    latency_s: float
    reads_meanwhile: tuple[bool, ...]
    adaptive: bool
    short_context: bool
    outcomes: tuple[Budget, ...]
    twigs: tuple[int, ...]
    least_ahead: int
    alone_every: int
    max_new_tokens: tuple[int, ...]
    eos: int | None

    @classmethod
    def random(cls, seed: int, *, perfect: bool = False) -> Scenario:
        """2 to 5 stages, 1 to 8 requests. perfect: every draft agrees with the target."""
        rng = random.Random(seed)
        num_stages = rng.randint(2, 5)
        num_requests = rng.choice([1, 1, 1, 2, 3, 8])
        run_ahead = tuple(rng.randint(1, 9) for _ in range(num_stages))
        agreement = tuple(rng.choice([0.0, 0.5, 0.8, 0.95, 1.0]) for _ in range(num_stages - 1))
        return cls(
            seed=seed,
            agreement=(1.0,) * num_stages if perfect else (*agreement, 1.0),
            run_ahead=run_ahead,
            wait=(0, *(rng.randint(0, run_ahead[i - 1]) for i in range(1, num_stages))),
            batch=rng.randint(1, 4),
            step_s=tuple(rng.choice([0.1, 0.5, 1.0, 3.0]) for _ in range(num_stages)),
            slope=rng.choice([0.0, 0.1]),
            latency_s=rng.choice([0.01, 0.3, 2.0]),
            reads_meanwhile=(rng.random() < 0.5,) * num_stages,
            adaptive=rng.random() < 0.25,
            short_context=rng.random() < 0.1,
            max_new_tokens=tuple(rng.randint(1, 20) for _ in range(num_requests)),
            eos=rng.choice([None, None, VOCAB_SIZE - 1]),
            outcomes=tuple(_budget(rng) for _ in range(num_stages - 1)),
            twigs=(0, *(rng.choice([0, rng.randint(1, 6)]) for _ in range(num_stages - 1))),
            least_ahead=rng.choice([1 << 30, rng.randint(1, 4)]),
            alone_every=rng.choice([0, 0, 0, rng.randint(1, 5)]),
        )

    def submits(self) -> list[Submit]:
        """Prompts are short and differ, so that a token of another request would show."""
        rng = random.Random(~self.seed)
        eos = () if self.eos is None else (self.eos,)
        return [
            Submit(
                request,
                (rng.randrange(VOCAB_SIZE), 50 + request, *([1] * rng.randrange(3))),
                (),
                SamplingParams(),
                max_new_tokens,
                eos,
                (),
            )
            for request, max_new_tokens in enumerate(self.max_new_tokens)
        ]

    def stages(self, *, timed: bool) -> list[SimStage]:
        """timed: waits for candidates end by themselves; untimed ones show every deadlock."""
        return [self._stage(index, timed) for index in range(len(self.step_s))]

    def _stage(self, index: int, timed: bool) -> SimStage:
        num_stages = len(self.step_s)
        above = self.run_ahead[index - 1] if index else 0
        context_length = 10 if self.short_context and index == 0 else 1 << 20

        def policy() -> Policy:
            if self.adaptive and index:
                return AdaptiveWait(above, patience_s=20.0) if timed else AdaptiveLookahead(above)
            patience_s = 20.0 if timed else None
            is_moody = self.alone_every and index == num_stages - 1
            if is_moody:
                return _MoodyWait(self.wait[index], patience_s, self.alone_every)
            return FixedWait(self.wait[index], patience_s, self.batch)

        return SimStage(
            role=lambda: Role(
                index,
                num_stages,
                self.run_ahead[index],
                above,
                self.batch,
                context_length,
                (*self.outcomes, Budget())[index],
                self.outcomes[index - 1].most_tokens(above) if index else 0,
                self.twigs[index],
                self.least_ahead,
            ),
            policy=policy,
            step_s=lambda length: self.step_s[index] * (1.0 + self.slope * (length - 1)),
            oracle=Oracle(self.agreement[index], VOCAB_SIZE, self.seed),
            reads_meanwhile=self.reads_meanwhile[index],
        )


class _MoodyWait(FixedWait):
    """A target that is alone for so many steps, then together with its drafts for as many."""

    def __init__(self, num_candidates: int, patience_s: float | None, num_steps: int) -> None:
        super().__init__(num_candidates, patience_s)
        self._num_steps, self._count = num_steps, 0

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        return (0, None) if self.is_alone else super().wait(situation)

    def on_step(self, result: StepResult) -> None:
        self._count += 1
        self.is_alone = self._count // self._num_steps % 2 == 1


def _budget(rng: random.Random) -> Budget:
    """None in half of the stages."""
    if rng.random() < 0.5:
        return Budget()
    return Budget(
        rng.randint(1, 3),
        rng.randint(1, 4),
        rng.randint(1, 4),
        rng.randint(2, 12),
    )


def simulate_seed(seed: int, faults: Faults = RELIABLE, *, perfect: bool = False) -> Report:
    """Runs the seed's scenario with all checks and compares the text with the target's own.

    Raises:
        InvariantViolation: naming the broken promise; the same seed fails the same way again.
    """
    from pipespec.simulate.checks import check

    scenario = Scenario.random(seed, perfect=perfect)
    submits = scenario.submits()
    simulation = Simulation(
        scenario.stages(timed=faults.any),
        submits,
        latency_s=scenario.latency_s,
        seed=seed,
        jitter=True,
        faults=faults,
    )
    report = simulation.run()
    if faults.unequal_target:
        return report  # no single model wrote it; that committed text never changes was checked
    target = Oracle(1.0, VOCAB_SIZE, seed)
    for submit in submits:
        expected = target.continuation(submit.prompt, submit.max_new_tokens, scenario.eos)
        check(report.outputs[submit.request] == expected, "the text is the target's own")
    return report
