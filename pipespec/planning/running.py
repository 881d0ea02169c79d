"""What models do in a run that they do not do alone: short runs of the real strategies.

A stage that runs is slower than its model alone: others compute beside it, its loop leaves it cold
caches, and between two forwards there are messages to read, branches to choose, drafts to send. All
of that is measured where it happens, as two numbers a stage: by how much forwards are longer, and
how long it is between them. Nothing is assumed about what a loop does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median
from typing import Final

from pipespec.config import GenerationParams, Schedule
from pipespec.decoding import (
    AsyncChainSpeculativeDecoder,
    ChainSpeculativeDecoder,
    Decoder,
    Generation,
    GreedyDecoder,
    Hierarchy,
)
from pipespec.metrics import StageCounts
from pipespec.planning.system import WARM_UP_TOKENS, PlanModel, StageCost
from pipespec.planning.times import Times

_LEAST_TOKENS: Final = 8  # of a text
_MOST_TOKENS: Final = 128
_MOST_S: Final = 2.0  # for a text of the target alone
_ENOUGH_S: Final = 1.0  # for all texts of one run
_MIN_TEXTS: Final = 3  # but so many
_TAKES_TURNS: Final = Schedule("pipespec", lookahead=1, run_ahead=1, outcomes=0)
_SAME_STEP_S: Final = 1e-6  # the forwards of one step follow each other without a loop


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs a hierarchy's strategies. models: their times alone. prompts: token ids.

    Each method raises `StageError` if a process fails, and `UsageError` for a model that cannot be
    loaded.
    """

    hierarchy: Hierarchy
    models: Sequence[PlanModel]
    prompts: Sequence[Sequence[int]]
    generation: GenerationParams
    transport: str
    ready_timeout_s: float

    def greedy(self) -> StageCost:
        """What `greedy` adds."""
        with GreedyDecoder(self.hierarchy) as decoder:
            (cost,) = self._in_one_process(decoder, [self.models[-1].times])
        return cost

    def chain(self) -> list[StageCost]:
        """What `chain` adds with all models, at each."""
        with ChainSpeculativeDecoder(self.hierarchy) as decoder:
            return self._in_one_process(decoder, [model.chain_times for model in self.models])

    def pipeline(self, stages: Sequence[int], outcomes: int) -> list[StageCost]:
        """What `async-chain` of these models adds, at each."""
        with self._pipeline(stages, Schedule(outcomes=outcomes)) as decoder:
            texts = self._write(decoder)
        costs = []
        for place, stage in enumerate(stages):
            counts = [StageCounts.from_values(text.counts[place]) for text in texts]
            ranks = outcomes > 0 and stage != stages[-1]
            slow_down = self._slow_down(counts, self.models[stage].times, ranks=ranks)
            costs.append(StageCost(slow_down, median(map(loop_s, counts))))
        return costs

    def hop_s(self) -> float:
        """Seconds from the end of a forward to the start of the one that it causes in the next
        process: the last two models take turns."""
        last_two = range(len(self.models) - 2, len(self.models))
        with self._pipeline(last_two, _TAKES_TURNS) as decoder:
            texts = self._write(decoder)
        pairs = [map(StageCounts.from_values, text.counts) for text in texts]
        return median(turn_s(*pair) for pair in pairs)

    def _pipeline(self, stages: Sequence[int], schedule: Schedule) -> AsyncChainSpeculativeDecoder:
        return AsyncChainSpeculativeDecoder(
            self.hierarchy.only(stages),
            schedule,
            transport=self.transport,
            ready_timeout_s=self.ready_timeout_s,
        )

    def _write(self, decoder: Decoder) -> list[Generation]:
        """Texts of the prompts, in turn, until there are enough of them."""
        step_s = self.models[-1].times.forward_s(1, self._context)
        most = max(_LEAST_TOKENS, min(_MOST_TOKENS, int(_MOST_S / max(step_s, 1e-6))))
        params = replace(self.generation, max_new_tokens=min(most, self.generation.max_new_tokens))
        decoder.generate(self.prompts[0], replace(params, max_new_tokens=WARM_UP_TOKENS))
        texts: list[Generation] = []
        start_s = time.monotonic()
        for prompt in cycle(self.prompts):
            if len(texts) >= _MIN_TEXTS and time.monotonic() - start_s > _ENOUGH_S:
                return texts
            texts.append(decoder.generate(prompt, params))
        return texts

    def _in_one_process(self, decoder: Decoder, alone: Sequence[Times]) -> list[StageCost]:
        """What a process that computes one thing at a time adds, at each of its models."""
        texts = self._write(decoder)
        between_s = median(map(_between_s, texts))
        counts = [list(map(StageCounts.from_values, text.counts)) for text in texts]
        return [
            StageCost(self._slow_down(stage, times), between_s)
            for stage, times in zip(zip(*counts), alone, strict=True)
        ]

    def _slow_down(
        self, texts: Sequence[StageCounts], alone: Times, *, ranks: bool = False
    ) -> float:
        """How many times as long the forwards of a stage took as the same ones alone: the median
        over the texts."""
        found = []
        for counts in texts:
            alone_s = sum(
                alone.forward_s(length, self._context, prepares=ranks)
                for length in counts.query_lengths
            )
            if alone_s:
                found.append(sum(counts.step_times_s) / alone_s)
        return median(found) if found else 1.0

    @property
    def _context(self) -> int:
        """The mean length of a text that is half written."""
        return sum(map(len, self.prompts)) // len(self.prompts) + _MOST_TOKENS // 2


def loop_s(counts: StageCounts) -> float:
    """Seconds between the end of a step and the start of the next that the stage did not wait: the
    mean gap without the waits, or the median one, if a machine that did something else makes that
    less."""
    gaps = gaps_s(counts)
    if not gaps:
        return 0.0
    return max(0.0, min(median(gaps), (sum(gaps) - counts.wait_s) / len(gaps)))


def gaps_s(counts: StageCounts) -> list[float]:
    """Seconds from the end of each step to the start of the next."""
    gaps = [start - end for start, end in zip(counts.step_starts_s[1:], _ends_s(counts))]
    return [gap for gap in gaps if gap > _SAME_STEP_S]


def turn_s(first: StageCounts, last: StageCounts) -> float:
    """Seconds from the end of a forward at one end of a pipeline to the start of the forward that
    it causes at the other: the mean of both ways, of each the median. The two must take turns."""
    return (_caused_s(first, last) + _caused_s(last, first)) / 2


def _caused_s(cause: StageCounts, effect: StageCounts) -> float:
    """From `cause` to `effect`: where a forward of `cause` ended after the last one of `effect`,
    what `effect` does next must be due to it."""
    causes, own = _ends_s(cause), _ends_s(effect)
    found = []
    for place, start in enumerate(effect.step_starts_s[1:]):
        before = [end for end in causes if own[place] <= end <= start]
        if before:
            found.append(start - before[-1])
    return median(found) if found else 0.0


def _ends_s(counts: StageCounts) -> list[float]:
    return [start + took for start, took in zip(counts.step_starts_s, counts.step_times_s)]


def _between_s(text: Generation) -> float:
    """Of a strategy in one process: what its text took beyond forwards, for each of its steps."""
    counts = [StageCounts.from_values(values) for values in text.counts]
    num_steps = sum(2 + len(gaps_s(stage)) for stage in counts)  # prefill and the first one
    forward_s = sum(stage.forward_s for stage in counts)
    return max(0.0, text.total_time_s - forward_s) / num_steps
