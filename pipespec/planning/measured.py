"""From a profile to the `System` that it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipespec.config import GenerationParams, ModelConfig
from pipespec.emulation import TokenOracle
from pipespec.messages import Submit
from pipespec.planning.profile import Profile
from pipespec.planning.system import (
    Overheads,
    PlanModel,
    StageCost,
    System,
    emulated_system,
    is_emulated,
)
from pipespec.planning.times import MeasuredTimes, Points
from pipespec.planning.trace import (
    Draws,
    Text,
    TraceOracle,
    agreement,
    rank_shares,
    recorded_draws,
    target_draws,
)


def measured_system(
    profile: Profile,
    models: Sequence[ModelConfig],
    generation: GenerationParams,
    vocab_size: int,
    eos: tuple[int, ...],
) -> System:
    """What a complete profile says of a hierarchy with weights. vocab_size: ids that may be drawn.
    eos: the target's end-of-text ids."""
    parts, indexes = profile.parts, range(len(models))
    texts = texts_of(parts)
    draws: list[Draws] = [draws_of(parts, index) for index in indexes[:-1]]
    return System(
        models=plan_models(parts, models, vocab_size),
        submits=tuple(
            Submit(number, text.prompt, (), generation.sampling, len(text.tokens), eos, ())
            for number, text in enumerate(texts)
        ),
        oracles=TraceOracles(texts, [*draws, target_draws(texts)], vocab_size),
        overheads=overheads_of(parts),
        slow_downs=tuple(tuple(_slow_down(parts, i, j) for j in indexes) for i in indexes),
    )


def overheads_of(parts: Mapping[str, Any]) -> Overheads:
    """What was measured in runs."""
    pipelines = {
        tuple(map(int, name.split("/")[1:])): {
            int(outcomes): [StageCost(**cost) for cost in costs] for outcomes, costs in part.items()
        }
        for name, part in parts.items()
        if name.startswith("async/")
    }
    return Overheads(
        StageCost(**parts["greedy"]),
        tuple(StageCost(**cost) for cost in parts["in-chain"]),
        pipelines,
        parts["hop"],
    )


def plan_models(
    parts: Mapping[str, Any], models: Sequence[ModelConfig], vocab_size: int
) -> tuple[PlanModel, ...]:
    """The models alone: as their tables say if all are emulated, else as measured."""
    if is_emulated(models):
        return emulated_system(models, (), vocab_size).models
    return tuple(_plan_model(parts, index, model) for index, model in enumerate(models))


def texts_of(parts: Mapping[str, Any]) -> list[Text]:
    """The target's texts that were written so far."""
    numbers = range(sum(name.startswith("text/") for name in parts))
    found = [parts[f"text/{number}"] for number in numbers]
    return [Text(tuple(item["prompt"]), tuple(item["tokens"])) for item in found]


def draws_of(parts: Mapping[str, Any], index: int) -> Draws:
    """What a draft drew along them."""
    return [[tuple(ranked) for ranked in text] for text in parts[f"draws/{index}"]]


def times_of(part: Mapping[str, Any]) -> MeasuredTimes:
    """Tables of step times."""
    decode, branching = (
        [(int(at), _points(points)) for at, points in part[name]]
        for name in ("decode", "branching")
    )
    return MeasuredTimes(decode, _points(part["prefill"]), branching)


def _plan_model(parts: Mapping[str, Any], index: int, model: ModelConfig) -> PlanModel:
    """One model's part."""
    part = parts[f"model/{index}"]
    times, in_chain = times_of(part), parts.get(f"chain/{index}")
    return PlanModel(
        name=model.name,
        times=times,
        chain_times=times if in_chain is None else times_of(in_chain),
        context_length=part["context_length"],
        num_tail_rows=part["num_tail_rows"],
        num_devices=len(model.devices),
        reads_meanwhile=part.get("frees_processor", False),  # not in older files
    )


@dataclass(frozen=True, slots=True)
class TraceOracles:
    """The oracles of any of the models, by their indexes; made once. draws: of each model."""

    texts: Sequence[Text]
    draws: Sequence[Draws]
    vocab_size: int
    _made: dict[tuple[int, ...], Sequence[TokenOracle]] = field(default_factory=dict)

    def __call__(self, stages: tuple[int, ...]) -> Sequence[TokenOracle]:
        """From the target up, each follows the next larger one where nothing was recorded."""
        if stages not in self._made:
            above = self(stages[1:]) if len(stages) > 1 else ()
            self._made[stages] = (self._oracle(stages, above), *above)
        return self._made[stages]

    def _oracle(self, stages: tuple[int, ...], above: Sequence[TokenOracle]) -> TraceOracle:
        """Of the first of the stages, the oracles of the others given."""
        draws = self.draws[stages[0]]
        larger = self.draws[stages[1]] if above else draws
        return TraceOracle(
            recorded=recorded_draws(self.texts, draws),
            vocab_size=self.vocab_size,
            larger=above[0] if above else None,
            agreement=agreement(draws, larger),
            rank_shares=rank_shares(draws, larger),
            own=stages[0] << 40,
        )


def _slow_down(parts: Mapping[str, Any], of: int, beside: int) -> float:
    if of == beside:
        return 1.0
    first, second = parts[f"beside/{min(of, beside)}/{max(of, beside)}"]
    return float(first if of < beside else second)


def _points(pairs: Sequence[Any]) -> Points:
    return [(int(count), float(ms)) for count, ms in pairs]
