"""Everything that a simulation of any part of a hierarchy needs, and the simulations themselves.

A `System` is made from emulated models (`emulated_system`) or a profile (`measured_system`). Three
ideas of cost: *ideal*, where a forward takes what it takes alone and nothing happens in between;
*shared*, where models that run at the same time slow each other down; *real*, with what loops and
messages add as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
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
    REAL = "real"


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a run adds to its forwards, in seconds: for each forward of greedy, of chain and of a
    stage of async-chain. send_s: more for a first draft that sends every token by itself. token_s:
    more for each drafted token that a stage finds when its forward ends. latency_s: from one
    process to another. The defaults are the figures of a two-core Xeon, rounded: of no weight
    beside steps of many milliseconds."""

    greedy_s: float = 2e-5
    chain_s: float = 6e-5
    async_s: float = 6e-5
    send_s: float = 3e-5
    token_s: float = 3e-5
    latency_s: float = LATENCY_S

    def between_s(self, choice: Choice, place: int) -> float:
        """For each forward of the model at a place among the stages."""
        if choice.strategy == "async-chain":
            is_chatty = place == 0 and choice.schedule.policy == "pipespec"
            return self.async_s + self.send_s * is_chatty
        return self.chain_s if choice.strategy == "chain" else self.greedy_s


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
        if choice.strategy != "async-chain" or cost is Cost.IDEAL or not self.slow_downs:
            return self._simulate(choice, wanted, cost, factors)
        busy = busy_guess or [1.0] * len(choice.stages)
        for _ in range(1 if busy_guess else _PASSES):
            factors = [self._factor(choice, place, busy) for place in range(len(busy))]
            prediction = self._simulate(choice, wanted, cost, factors)
            busy = prediction.busy_shares
        return prediction

    def _factor(self, choice: Choice, place: int, busy: Sequence[float]) -> float:
        """How much slower a stage is beside others that compute for these parts of the time."""
        own = choice.stages[place]
        others = [(stage, share) for stage, share in zip(choice.stages, busy) if stage != own]
        return 1.0 + sum((self.slow_downs[own][stage] - 1.0) * share for stage, share in others)

    def _simulate(
        self, choice: Choice, submits: Sequence[Submit], cost: Cost, factors: Sequence[float]
    ) -> Prediction:
        is_real = cost is Cost.REAL
        models = [
            SimModel(
                forward_s=self._forward_s(choice, place, factors[place]),
                oracle=oracle,
                between_s=self.overheads.between_s(choice, place) if is_real else 0.0,
                context_length=self.models[stage].context_length,
                num_tail_rows=self.models[stage].num_tail_rows,
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
            latency_s=self.overheads.latency_s if is_real else 0.0,
            token_s=self.overheads.token_s if is_real else 0.0,
            num_warm_up_tokens=WARM_UP_TOKENS,
        )

    def _forward_s(self, choice: Choice, place: int, factor: float) -> Callable[[int, int], float]:
        """Seconds of a forward of the model at a place among the stages, by number of tokens and
        length of the text; all are `factor` times as long as alone."""
        model, schedule = self.models[choice.stages[place]], choice.schedule
        if choice.strategy == "chain":
            return lambda count, context: model.chain_times.forward_s(count, context)
        is_last = place == len(choice.stages) - 1
        branches = schedule.tree if is_last else schedule.outcomes
        prepares = branches > 0 and choice.strategy == "async-chain"
        return lambda count, context: (
            factor * model.times.forward_s(count, context, prepares=prepares)
        )


def emulated_system(
    models: Sequence[ModelConfig], submits: Sequence[Submit], vocab_size: int
) -> System:
    """Of emulated models, whose tables are all that is needed: nothing is measured.

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
            PlanModel(name, times, times, context_length, same.num_tail_rows, len(model.devices))
        )
    eos_after = emulations[-1][1].eos_after
    return System(
        models=tuple(found),
        submits=tuple(_until_end(submit, eos_after) for submit in submits),
        oracles=lambda stages: [oracles[stage] for stage in stages],
    )


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
