"""What real processes add to forwards: measured with the real strategies on models that only sleep.

The *twins* of a hierarchy's models take their times and agree as often as they do, on the same
cores, with the same tokenizer, sockets and loops; so whatever a run takes beyond its forwards is
what the loops and messages take. What twins do not have is the models' hunger for caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean, median
from typing import Final

from pipespec.config import GenerationParams, ModelConfig, Schedule
from pipespec.decoding import (
    AsyncChainSpeculativeDecoder,
    ChainSpeculativeDecoder,
    Generation,
    GreedyDecoder,
    Hierarchy,
)
from pipespec.metrics import StageCounts
from pipespec.planning.system import Overheads

_NUM_TOKENS: Final = 64
_NUM_HOPS: Final = 100
_MOST_S: Final = 6.0  # for the text of one strategy, by its greedy time
_MUCH_LONGER: Final = 4.0  # than the median: a stage that waited, not its loop


def measure_overheads(
    hierarchy: Hierarchy,
    step_ms: Sequence[float],
    agreements: Sequence[float],
    prompt: Sequence[int],
    *,
    transport: str,
    ready_timeout_s: float,
) -> Overheads:
    """Runs every strategy once on twins.

    step_ms: of each model, for one token. agreements: of each draft with the target.

    Raises:
        StageError: a process failed.
    """
    twins = make_twins(hierarchy, step_ms, agreements)
    limit = max(8, min(_NUM_TOKENS, int(_MOST_S * 1e3 / max(step_ms[-1], 1e-3))))
    params = GenerationParams(max_new_tokens=limit)

    def open_async(models: Hierarchy, schedule: Schedule) -> AsyncChainSpeculativeDecoder:
        return AsyncChainSpeculativeDecoder(
            models, schedule, transport=transport, ready_timeout_s=ready_timeout_s
        )

    with GreedyDecoder(twins) as greedy:
        greedy_s = _between_s(greedy.generate(prompt, params))
    with ChainSpeculativeDecoder(twins) as chain:
        chain_s = _between_s(chain.generate(prompt, params))
    with open_async(twins, Schedule()) as decoder:
        async_s = loop_s(_counts(decoder.generate(prompt, params))[0])
    ends = _ends_only(make_twins(hierarchy, [0.0] * len(step_ms), [1.0] * len(agreements)))
    with open_async(ends, Schedule("pipespec", lookahead=1, run_ahead=1)) as decoder:
        first, last = _counts(decoder.generate(prompt, GenerationParams(_NUM_HOPS)))
    return Overheads(greedy_s, chain_s, async_s, max(0.0, hop_s(first, last) - async_s))


def make_twins(
    hierarchy: Hierarchy, step_ms: Sequence[float], agreements: Sequence[float]
) -> Hierarchy:
    """The same hierarchy, its models replaced by emulated ones, whose texts do not end early."""
    models = tuple(
        ModelConfig(
            path=f"twin/{model.name}",
            devices=model.devices,
            emulated={"step_ms": {"1": ms}}
            | ({} if index == len(agreements) else {"agreement": agreements[index]}),
        )
        for index, (model, ms) in enumerate(zip(hierarchy.models, step_ms, strict=True))
    )
    return replace(hierarchy, models=models, folders=(None,) * len(models), eos=())


def loop_s(counts: StageCounts) -> float:
    """Seconds from the end of a forward to the start of the next, where the stage did not wait: the
    mean of the gaps that are not much longer than most of the shorter half."""
    gaps = sorted(
        later - (earlier + took)
        for (earlier, later), took in zip(pairwise(counts.step_starts_s), counts.step_times_s)
    )
    if not gaps:
        return 0.0
    usual = median(gaps[: (len(gaps) + 1) // 2])
    return max(0.0, mean(gap for gap in gaps if gap <= _MUCH_LONGER * max(usual, 1e-6)))


def hop_s(first: StageCounts, last: StageCounts) -> float:
    """Seconds from the end of a forward at one end of a pipeline to the start of the forward that
    it causes at the other: the mean of both ways. The two must take turns."""
    return (_caused_s(first, last) + _caused_s(last, first)) / 2


def _caused_s(cause: StageCounts, effect: StageCounts) -> float:
    """Median seconds from the last end of a forward of `cause` before each start of `effect`."""
    ends = [
        start + took for start, took in zip(cause.step_starts_s, cause.step_times_s, strict=True)
    ]
    gaps = []
    for start in effect.step_starts_s:
        before = [end for end in ends if end <= start]
        if before:
            gaps.append(start - before[-1])
    return median(gaps) if gaps else 0.0


def _ends_only(hierarchy: Hierarchy) -> Hierarchy:
    """Its first and its last model."""
    return replace(
        hierarchy,
        models=(hierarchy.models[0], hierarchy.models[-1]),
        folders=(hierarchy.folders[0], hierarchy.folders[-1]),
        tokenizer_folders=(hierarchy.tokenizer_folders[0], hierarchy.tokenizer_folders[-1]),
        placements=(hierarchy.placements[0], hierarchy.placements[-1]),
    )


def _counts(output: Generation) -> list[StageCounts]:
    return [StageCounts.from_values(values) for values in output.counts]


def _between_s(output: Generation) -> float:
    """Of a strategy in one process: what its text took beyond forwards, for each of those."""
    counts = _counts(output)
    forward_s = sum(stage.forward_s for stage in counts)
    num_forwards = sum(stage.num_steps + 1 for stage in counts)
    return max(0.0, output.total_time_s - forward_s) / num_forwards
