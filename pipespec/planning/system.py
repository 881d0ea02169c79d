"""Everything that a simulation of any part of a hierarchy needs, and the simulations themselves.

A `System` is made from emulated models (`emulated_system`) or from a profile (`profile`). Three
ideas of cost: *ideal*, where a forward takes what it takes alone and nothing happens in between;
*shared*, where models that run at the same time slow each other down; *real*, with what loops and
messages add as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from pipespec.config import ModelConfig, Schedule
from pipespec.emulation import TokenOracle
from pipespec.messages import Submit
from pipespec.planning.times import EmulatedTimes, Times
from pipespec.simulate.prediction import (
    LATENCY_S,
    Prediction,
    SimModel,
    emulations_of,
    predict_texts,
)

WARM_UP_TOKENS: Final = 16  # as `commands.runs`
_BETWEEN_S: Final = 5e-5
_PASSES: Final = 3  # to settle how busy stages are that slow each other down


class Cost(Enum):
    """What a simulation counts besides forwards."""

    IDEAL = "ideal"
    SHARED = "shared"
    REAL = "real"


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a run adds to its forwards, in seconds: for each forward, by strategy; latency_s: from
    one process to another. The defaults are the figures of a two-core Xeon, rounded: of no weight
    beside steps of many milliseconds."""

    greedy_s: float = _BETWEEN_S
    chain_s: float = _BETWEEN_S
    async_s: float = _BETWEEN_S
    latency_s: float = LATENCY_S

    def between_s(self, strategy: str) -> float:
        """For each forward of a strategy."""
        return {"greedy": self.greedy_s, "chain": self.chain_s}.get(strategy, self.async_s)


@dataclass(frozen=True, slots=True)
class PlanModel:
    """One model. times: alone where its stage runs. chain_times: in the target's process, which
    runs on the target's cores. num_devices: that its config names; 1 if it names none."""

    name: str
    times: Times
    chain_times: Times
    context_length: int = 1 << 40
    num_tail_rows: int = 0
    num_devices: int = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to run a hierarchy. stages: indexes of its models, smallest draft first."""

    stages: tuple[int, ...]
    strategy: str
    schedule: Schedule = Schedule()


@dataclass(frozen=True, slots=True)
class System:
    """A hierarchy as simulations know it.

    oracles: of the models with these indexes, in their order. submits: what is to be written.
    slow_downs[i][j]: how many times as long a forward of model i takes while model j computes.
    """

    models: tuple[PlanModel, ...]
    submits: tuple[Submit, ...]
    oracles: Callable[[tuple[int, ...]], Sequence[TokenOracle]]
    overheads: Overheads = Overheads()
    slow_downs: tuple[tuple[float, ...], ...] = ()

    @property
    def target(self) -> int:
        return len(self.models) - 1

    @property
    def can_prepare(self) -> bool:
        """Whether any draft's runner can prepare for outcomes."""
        return any(model.num_tail_rows for model in self.models[:-1])

    def with_target_times(self, times: Times, num_devices: int) -> System:
        """The same with a target on so many devices."""
        target = replace(self.models[-1], times=times, chain_times=times, num_devices=num_devices)
        return replace(self, models=(*self.models[:-1], target))

    def step_s(self, index: int, num_tokens: int = 1) -> float:
        """Seconds of a step in the middle of a text; of one token, it is what models are ordered
        by."""
        return self.models[index].times.forward_s(num_tokens, _middle(self.submits))

    def predict(
        self,
        choice: Choice,
        submits: Sequence[Submit] | None = None,
        cost: Cost = Cost.REAL,
        *,
        busy_guess: Sequence[float] = (),
    ) -> Prediction:
        """What the choice would do with `submits` (all of them by default).

        busy_guess: how busy its stages are about, as a like choice's `busy_shares` say; without it
        more than one simulation may be needed where stages slow each other down.
        """
        wanted = self.submits if submits is None else submits
        factors = [1.0] * len(choice.stages)
        if choice.strategy != "async-chain" or cost is Cost.IDEAL or not self._share(choice):
            return self._simulate(choice, wanted, cost, factors)
        busy = busy_guess or [1.0] * len(choice.stages)
        for _ in range(1 if busy_guess else _PASSES):
            factors = [self._factor(choice, place, busy) for place in range(len(busy))]
            prediction = self._simulate(choice, wanted, cost, factors)
            busy = prediction.busy_shares
        return prediction

    def _share(self, choice: Choice) -> bool:
        """Whether any two of the stages slow each other down."""
        pairs = [(i, j) for i in choice.stages for j in choice.stages if i != j]
        return bool(self.slow_downs) and any(self.slow_downs[i][j] != 1.0 for i, j in pairs)

    def _factor(self, choice: Choice, place: int, busy: Sequence[float]) -> float:
        """How much slower a stage is beside others that compute for these parts of the time."""
        own = choice.stages[place]
        others = [(stage, share) for stage, share in zip(choice.stages, busy) if stage != own]
        return 1.0 + sum((self.slow_downs[own][stage] - 1.0) * share for stage, share in others)

    def _simulate(
        self, choice: Choice, submits: Sequence[Submit], cost: Cost, factors: Sequence[float]
    ) -> Prediction:
        is_real = cost is Cost.REAL
        between_s = self.overheads.between_s(choice.strategy) if is_real else 0.0
        oracles = self.oracles(choice.stages)
        models = [
            _sim_model(self.models[stage], choice, factor, between_s, oracle)
            for stage, factor, oracle in zip(choice.stages, factors, oracles, strict=True)
        ]
        return predict_texts(
            models,
            choice.strategy,
            choice.schedule,
            submits,
            latency_s=self.overheads.latency_s if is_real else 0.0,
            num_warm_up_tokens=WARM_UP_TOKENS,
        )


def emulated_system(
    models: Sequence[ModelConfig],
    num_tail_rows: Sequence[int],
    submits: Sequence[Submit],
    vocab_size: int,
) -> System:
    """Of emulated models, whose tables are all that is needed: nothing is measured.

    num_tail_rows: as of their runners. vocab_size: of their tokenizer.

    Raises:
        ConfigError: a model that is not emulated, or whose "emulated" object is wrong.
    """
    emulations = emulations_of(models)
    oracles = [
        _Remembering(emulation.oracle(min(vocab_size, emulation.vocab_size), name))
        for name, emulation in emulations
    ]
    found = []
    for model, rows, (name, emulation) in zip(models, num_tail_rows, emulations, strict=True):
        times = EmulatedTimes(emulation)
        found.append(
            PlanModel(name, times, times, emulation.context_length, rows, num_devices(model))
        )
    eos_after = emulations[-1][1].eos_after
    return System(
        models=tuple(found),
        submits=tuple(_until_end(submit, eos_after) for submit in submits),
        oracles=lambda stages: [oracles[stage] for stage in stages],
    )


def num_devices(model: ModelConfig) -> int:
    """Devices that a config gives a model."""
    return len(model.devices)


@dataclass(frozen=True, slots=True)
class _Remembering:
    """An oracle that computes each answer once: simulations ask the same again and again."""

    oracle: TokenOracle
    _draws: dict[int, int] = field(default_factory=dict)
    _ranked: dict[tuple[int, int], Sequence[int]] = field(default_factory=dict)

    def draw(self, prefix_hash: int) -> int:
        """See `TokenOracle`."""
        token = self._draws.get(prefix_hash)
        if token is None:
            token = self._draws[prefix_hash] = self.oracle.draw(prefix_hash)
        return token

    def ranked(self, prefix_hash: int, num_choices: int) -> Sequence[int]:
        """See `TokenOracle`."""
        if num_choices == 1:
            return (self.draw(prefix_hash),)
        key = prefix_hash, num_choices
        choices = self._ranked.get(key)
        if choices is None:
            choices = self._ranked[key] = self.oracle.ranked(prefix_hash, num_choices)
        return choices


def _until_end(submit: Submit, eos_after: int | None) -> Submit:
    """An emulated text ends at a position (`eos_after`), which an oracle is not told."""
    if eos_after is None or eos_after < len(submit.prompt):
        return submit
    left = eos_after - len(submit.prompt) + 1
    return replace(submit, max_new_tokens=min(submit.max_new_tokens, left))


def _sim_model(
    model: PlanModel, choice: Choice, factor: float, between_s: float, oracle: TokenOracle
) -> SimModel:
    times = model.chain_times if choice.strategy == "chain" else model.times
    prepares = choice.strategy == "async-chain" and bool(choice.schedule.outcomes)
    return SimModel(
        forward_s=lambda count, context: (
            factor * times.forward_s(count, context, prepares=prepares)
        ),
        oracle=oracle,
        between_s=between_s,
        context_length=model.context_length,
        num_tail_rows=model.num_tail_rows,
    )


def _middle(submits: Sequence[Submit]) -> int:
    """The mean length of a text that is half written."""
    lengths = [len(submit.prompt) + submit.max_new_tokens // 2 for submit in submits]
    return sum(lengths) // len(lengths)
