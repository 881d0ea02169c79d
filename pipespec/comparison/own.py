"""Our strategies as contestants, in the process that the race started for one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipespec.comparison.drafting import StageSums
from pipespec.comparison.speaker import Answer, Speaker
from pipespec.comparison.specification import model_of, place_of
from pipespec.config import GenerationParams, SamplingParams, Schedule
from pipespec.decoding import (
    AsyncChainSpeculativeDecoder,
    ChainSpeculativeDecoder,
    GreedyDecoder,
    Hierarchy,
    open_hierarchy,
)
from pipespec.errors import ModelLoadError
from pipespec.metrics import StageCounts
from pipespec.worker import pin

AnyDecoder = GreedyDecoder | ChainSpeculativeDecoder | AsyncChainSpeculativeDecoder


class OwnSpeaker:
    """A decoder that is asked for texts."""

    def __init__(self, decoder: AnyDecoder, sampling: SamplingParams, info: dict[str, Any]) -> None:
        self._decoder = decoder
        self._sampling = sampling
        self._variant: Mapping[str, Any] = {}
        self.info = info

    def generate(self, ids: list[int], max_new_tokens: int, variant: Mapping[str, Any]) -> Answer:
        """See `Speaker`. variant: of chain, {"lookahead": N}."""
        if variant != self._variant:
            assert isinstance(self._decoder, ChainSpeculativeDecoder)
            self._decoder.use(Schedule(**variant))
            self._variant = variant
        output = self._decoder.generate(ids, GenerationParams(max_new_tokens, self._sampling))
        return Answer(
            output.token_ids,
            output.total_time_s,
            output.time_to_first_token_s,
            output.arrivals[0][1],
            tuple(StageSums.of(StageCounts.from_values(values)) for values in output.counts),
        )


@contextlib.contextmanager
def open_own(spec: Mapping[str, Any]) -> Iterator[Speaker]:
    """Loads the models of a strategy where the specification says.

    The models are looked for before this process is pinned, because that also looks at the machine,
    and a place is named by its number among all cores.
    """
    strategy = spec["settings"]["strategy"]
    hierarchy = _hierarchy(spec, strategy)
    pin(spec["cores"])
    schedule = Schedule(**spec["settings"].get("schedule", {}))
    with _decoder(strategy, hierarchy, schedule, spec["timeout_s"]) as decoder:
        info: dict[str, Any] = {}
        if isinstance(decoder, AsyncChainSpeculativeDecoder):
            info["stages"] = list(decoder.pipeline.infos)
            check_branches(schedule, info["stages"])
        yield OwnSpeaker(decoder, SamplingParams(**spec["sampling"]), info)


def check_branches(schedule: Schedule, stages: Sequence[Mapping[str, Any]]) -> None:
    """Whether any draft can prepare the outcomes that the schedule asks for, and any stage after it
    verify a tree of them; without, this would be another contestant under a wrong name. stages:
    what each runner says of itself, target last.

    Raises:
        ModelLoadError: none can.
    """
    can = [stage["num_tail_rows"] > 0 for stage in stages]
    by_default = Schedule(schedule.policy).outcomes
    if schedule.outcomes not in (0, by_default) and not any(can[:-1]):
        raise ModelLoadError("the runners of its drafts prepare no outcomes")
    if schedule.tree and not any(can[1:]):
        raise ModelLoadError("the runners after its first draft verify no trees")


def _hierarchy(spec: Mapping[str, Any], strategy: str) -> Hierarchy:
    models = [model_of(values) for values in spec["models"]]
    hierarchy = open_hierarchy(
        models, base=Path(spec["base"]), target_only=strategy == "greedy"
    ).limited_to(spec["num_positions"])
    places = tuple(place_of(values) for values in spec["places"])
    return replace(hierarchy, placements=places)


def _decoder(
    strategy: str, hierarchy: Hierarchy, schedule: Schedule, timeout_s: float
) -> AnyDecoder:
    if strategy == "greedy":
        return GreedyDecoder(hierarchy)
    if strategy == "chain":
        return ChainSpeculativeDecoder(hierarchy, schedule)
    return AsyncChainSpeculativeDecoder(hierarchy, schedule, ready_timeout_s=timeout_s)
