"""Everything that a simulation of any part of a hierarchy needs, and the simulations themselves.

A `System` is made from emulated models (`emulated_system`) or a profile (`measured_system`). Four
ideas of cost, each with what the one before it counts: *ideal*, where a forward takes what it takes
alone and nothing happens in between; *shared*, where models that compute at the same time slow each
other down; *slower*, with forwards as they were measured in a run, which has other reasons too;
*real*, with what loops and messages add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Final

from pipespec.config import ModelConfig, Schedule
from pipespec.emulation import TokenOracle
from pipespec.messages import Submit
from pipespec.planning.times import EmulatedTimes, Times, interpolate
from pipespec.simulate.prediction import (
    LATENCY_S,
    Prediction,
    SimModel,
    emulated_model,
    emulations_of,
    predict_texts,
)

WARM_UP_TOKENS: Final = 16  # as `commands.runs`
_PASSES: Final = 3  # to settle how busy stages are that slow each other down


class Cost(Enum):
    """What a simulation counts besides forwards."""

    IDEAL = "ideal"
    SHARED = "shared"
    SLOWER = "slower"
    REAL = "real"


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a run adds at one stage. slow_down: how many times as long forwards are as alone.
    loop_s: seconds from the end of a step to the start of the next, without waits."""

    slow_down: float = 1.0
    loop_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Overheads:
    """What runs add to forwards alone. chain: at each model. pipelines: of async-chain, at each of
    the models with these indexes, ascending, by `Schedule.outcomes`; between those that are there
    it is as much as the number of outcomes is. hop_s: from the end of a forward to the start of the
    one that it causes in the next process. What is not there costs nothing."""

    greedy: StageCost = StageCost()
    chain: tuple[StageCost, ...] = ()
    pipelines: Mapping[tuple[int, ...], Mapping[int, Sequence[StageCost]]] = field(
        default_factory=dict
    )
    hop_s: float = LATENCY_S

    def at(self, choice: Choice, stage: int) -> StageCost:
        """For a choice, at one of the models."""
        if choice.strategy == "greedy":
            return self.greedy
        if choice.strategy == "chain":
            return self.chain[stage] if self.chain else StageCost()
        stages = tuple(sorted(choice.stages))
        points = [
            (outcomes, costs[stages.index(stage)])
            for outcomes, costs in sorted(self.pipelines.get(stages, {}).items())
        ]
        if not points:
            return StageCost()
        outcomes = choice.schedule.outcomes
        return StageCost(
            interpolate([(at, cost.slow_down) for at, cost in points], outcomes),
            interpolate([(at, cost.loop_s) for at, cost in points], outcomes),
        )


@dataclass(frozen=True, slots=True)
class PlanModel:
    """One model. times: alone where its stage runs. chain_times: in the target's process, which
    runs on the target's cores. num_devices: that its config names; 1 if it names none. Others: as
    of `SimModel`."""

    name: str
    times: Times
    chain_times: Times
    context_length: int = 1 << 40
    num_tail_rows: int = 0
    num_devices: int = 1
    reads_meanwhile: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to run a hierarchy. stages: indexes of its models, smallest draft first."""

    stages: tuple[int, ...]
    strategy: str
    schedule: Schedule = Schedule()

    @property
    def flags(self) -> dict[str, str]:
        """The flags of the schedule that are not at their defaults."""
        default = Schedule()
        return {
            item.name.replace("_", "-"): str(value)
            for item in fields(default)
            if (value := getattr(self.schedule, item.name)) != getattr(default, item.name)
        }


@dataclass(frozen=True, slots=True)
class System:
    """A hierarchy as simulations know it.

    oracles: of the models with these indexes, in their order. submits: what is to be written.
    slow_downs[i][j]: how many times as long a forward of model i takes while model j computes;
    `Cost.SHARED` alone uses it.
    """

    models: tuple[PlanModel, ...]
    submits: tuple[Submit, ...]
    oracles: Callable[[tuple[int, ...]], Sequence[TokenOracle]]
    overheads: Overheads = Overheads()
    slow_downs: tuple[tuple[float, ...], ...] = ()

    @property
    def target(self) -> int:
        return len(self.models) - 1

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
    ) -> Prediction:
        """What the choice would do with `submits` (all of them by default)."""
        wanted = self.submits if submits is None else submits
        if cost is Cost.SHARED and choice.strategy == "async-chain" and self.slow_downs:
            return self._predict_shared(choice, wanted)
        counts_forwards = cost in (Cost.SLOWER, Cost.REAL)
        costs = [self.overheads.at(choice, stage) for stage in choice.stages]
        return self._simulate(
            choice,
            wanted,
            [item.slow_down if counts_forwards else 1.0 for item in costs],
            [item.loop_s if cost is Cost.REAL else 0.0 for item in costs],
            self.overheads.hop_s if cost is Cost.REAL else 0.0,
        )

    def _predict_shared(self, choice: Choice, submits: Sequence[Submit]) -> Prediction:
        """How busy stages are decides how much they slow each other down, and that how busy they
        are."""
        busy: Sequence[float] = [1.0] * len(choice.stages)
        for _ in range(_PASSES):
            factors = [self._factor(choice, place, busy) for place in range(len(busy))]
            prediction = self._simulate(choice, submits, factors)
            busy = prediction.busy_shares
        return prediction

    def _factor(self, choice: Choice, place: int, busy: Sequence[float]) -> float:
        """How much slower a stage is beside others that compute for these parts of the time."""
        own = choice.stages[place]
        others = [(stage, share) for stage, share in zip(choice.stages, busy) if stage != own]
        return 1.0 + sum((self.slow_downs[own][stage] - 1.0) * share for stage, share in others)

    def _simulate(
        self,
        choice: Choice,
        submits: Sequence[Submit],
        factors: Sequence[float],
        loops_s: Sequence[float] | None = None,
        hop_s: float = 0.0,
    ) -> Prediction:
        models = [
            SimModel(
                forward_s=self._forward_s(choice, place, factors[place]),
                oracle=oracle,
                between_s=loops_s[place] if loops_s else 0.0,
                context_length=self.models[stage].context_length,
                num_tail_rows=self.models[stage].num_tail_rows,
                reads_meanwhile=self.models[stage].reads_meanwhile,
            )
            for place, (stage, oracle) in enumerate(
                zip(choice.stages, self.oracles(choice.stages), strict=True)
            )
        ]
        return predict_texts(
            models,
            choice.strategy,
            choice.schedule,
            submits,
            latency_s=hop_s,
            num_warm_up_tokens=WARM_UP_TOKENS,
        )

    def _forward_s(self, choice: Choice, place: int, factor: float) -> Callable[[int, int], float]:
        """Seconds of a forward of the model at a place among the stages, by number of tokens and
        length of the text; all are `factor` times as long as alone."""
        model, schedule = self.models[choice.stages[place]], choice.schedule
        if choice.strategy == "chain":
            return lambda count, context: factor * model.chain_times.forward_s(count, context)
        is_last = place == len(choice.stages) - 1
        branches = schedule.tree if is_last else schedule.outcomes
        prepares = branches > 0 and choice.strategy == "async-chain"
        return lambda count, context: (
            factor * model.times.forward_s(count, context, prepares=prepares)
        )


def emulated_system(
    models: Sequence[ModelConfig],
    submits: Sequence[Submit],
    vocab_size: int,
    overheads: Overheads | None = None,
) -> System:
    """Of emulated models, whose tables say all but what runs add.

    vocab_size: of their tokenizer.

    Raises:
        ConfigError: a model that is not emulated, or whose "emulated" object is wrong.
    """
    emulations = emulations_of(models)
    oracles, found = [], []
    for model, (name, emulation) in zip(models, emulations, strict=True):
        same = emulated_model(name, emulation, vocab_size)
        oracles.append(_Remembering(same.oracle))
        times, context_length = EmulatedTimes(emulation), emulation.context_length
        found.append(
            PlanModel(
                name=name,
                times=times,
                chain_times=times,
                context_length=context_length,
                num_tail_rows=same.num_tail_rows,
                num_devices=len(model.devices),
                reads_meanwhile=same.reads_meanwhile,
            )
        )
    eos_after = emulations[-1][1].eos_after
    return System(
        models=tuple(found),
        submits=tuple(_until_end(submit, eos_after) for submit in submits),
        oracles=lambda stages: [oracles[stage] for stage in stages],
        overheads=overheads or Overheads(),
    )


def is_emulated(models: Sequence[ModelConfig]) -> bool:
    """Whether none has weights."""
    return all(model.emulated is not None for model in models)


@dataclass(frozen=True, slots=True)
class _Remembering:
    """An oracle that computes each answer once: simulations ask the same again and again."""

    oracle: TokenOracle
    _memory: dict[tuple[int, int], Sequence[int]] = field(default_factory=dict)

    def draw(self, prefix_hash: int) -> int:
        """See `TokenOracle`."""
        return self.ranked(prefix_hash, 1)[0]

    def ranked(self, prefix_hash: int, num_choices: int) -> Sequence[int]:
        """See `TokenOracle`."""
        key = prefix_hash, num_choices
        if key not in self._memory:
            is_one = num_choices == 1  # and the others cost time to make up
            first = (self.oracle.draw(prefix_hash),)
            self._memory[key] = first if is_one else self.oracle.ranked(prefix_hash, num_choices)
        return self._memory[key]


def _until_end(submit: Submit, eos_after: int | None) -> Submit:
    """An emulated text ends at a position (`eos_after`), which an oracle is not told."""
    if eos_after is None or eos_after < len(submit.prompt):
        return submit
    left = eos_after - len(submit.prompt) + 1
    return replace(submit, max_new_tokens=min(submit.max_new_tokens, left))


def _middle(submits: Sequence[Submit]) -> int:
    """The mean length of a text that is half written."""
    lengths = [len(submit.prompt) + submit.max_new_tokens // 2 for submit in submits]
    return sum(lengths) // len(lengths)
