"""What real processes add to forwards: measured with the real strategies, each run once.

For `async-chain` the two largest models run for a moment: a loop that comes back from a forward
finds its caches full of weights, and a verifier's has messages to read and to write. For the
others, and the way between processes, *twins* of the models do, which only sleep as long as the
models take and agree as often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
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

_NUM_TOKENS: Final = 96
_MOST_S: Final = 6.0  # for the text of one strategy, by its greedy time


def measure_overheads(
    hierarchy: Hierarchy,
    step_ms: Sequence[float],
    agreements: Sequence[float],
    prompt: Sequence[int],
    *,
    transport: str,
    ready_timeout_s: float,
) -> Overheads:
    """step_ms: of each model, for one token. agreements: of each draft with the target.

    Raises:
        StageError: a process failed.
    """
    twins = make_twins(hierarchy, step_ms, agreements)
    limit = max(8, min(_NUM_TOKENS, int(_MOST_S * 1e3 / max(step_ms[-1], 1e-3))))

    def run_async(models: Hierarchy, schedule: Schedule) -> list[StageCounts]:
        with AsyncChainSpeculativeDecoder(
            models, schedule, transport=transport, ready_timeout_s=ready_timeout_s
        ) as decoder:
            decoder.generate(prompt, GenerationParams(8))
            return _counts(decoder.generate(prompt, GenerationParams(limit)))

    with GreedyDecoder(twins) as greedy:
        greedy_s = _between_s(greedy.generate(prompt, GenerationParams(limit)))
    with ChainSpeculativeDecoder(twins) as chain:
        chain_s = _between_s(chain.generate(prompt, GenerationParams(limit)))
    pair = _last_two(hierarchy)
    draft, target = run_async(pair, Schedule(outcomes=0))
    chatty, _ = run_async(pair, Schedule("pipespec", 0))
    async_s = loop_s(draft)
    instant = make_twins(hierarchy, [0.0] * len(step_ms), [1.0] * len(agreements))
    turns = run_async(_last_two(instant), Schedule("pipespec", lookahead=1, run_ahead=1))
    return Overheads(
        greedy_s,
        chain_s,
        async_s,
        send_s=max(0.0, loop_s(chatty) - async_s),
        token_s=token_s(draft, target),
        latency_s=max(0.0, hop_s(*turns) - loop_s(turns[0])),
    )


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
    """Seconds between the end of a forward and the start of the next that the stage did not wait:
    the mean gap without the waits, or the median one, if waits between texts or a machine that did
    something else make that less."""
    ends = [start + took for start, took in zip(counts.step_starts_s, counts.step_times_s)]
    gaps = [start - end for start, end in zip(counts.step_starts_s[1:], ends)]
    if not gaps:
        return 0.0
    return max(0.0, min(median(gaps), (sum(gaps) - counts.wait_s) / len(gaps)))


def token_s(draft: StageCounts, target: StageCounts) -> float:
    """How much longer a target's loop is than a draft's, for each drafted token that it reads."""
    num_tokens = draft.num_drafted / max(1, target.num_steps)
    return max(0.0, loop_s(target) - loop_s(draft)) / max(1.0, num_tokens)


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


def _last_two(hierarchy: Hierarchy) -> Hierarchy:
    """The target and the model before it."""
    return replace(
        hierarchy,
        models=hierarchy.models[-2:],
        folders=hierarchy.folders[-2:],
        tokenizer_folders=hierarchy.tokenizer_folders[-2:],
        placements=hierarchy.placements[-2:],
    )


def _counts(output: Generation) -> list[StageCounts]:
    return [StageCounts.from_values(values) for values in output.counts]


def _between_s(output: Generation) -> float:
    """Of a strategy in one process: what its text took beyond forwards, for each of those."""
    counts = _counts(output)
    forward_s = sum(stage.forward_s for stage in counts)
    num_forwards = sum(stage.num_steps + 1 for stage in counts)
    return max(0.0, output.total_time_s - forward_s) / num_forwards
