"""Which stages of a run did not pay: what it counted, simulated with and without each of them.

Pure. Knows nothing of the texts but how long they were and how often a candidate was accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import median
from typing import Final

from pipespec.config import SamplingParams, Schedule
from pipespec.emulation import TokenOracle
from pipespec.emulation.model import NUM_TAIL_ROWS
from pipespec.emulation.oracle import DEMO_RANK_EXPONENT
from pipespec.messages import Submit
from pipespec.metrics import StageCounts
from pipespec.metrics.definitions import ratio
from pipespec.planning.search import sample
from pipespec.planning.system import Choice, PlanModel, System
from pipespec.planning.times import MeasuredTimes, Points
from pipespec.planning.trace import TraceOracle

MIN_GAIN: Final = 0.05  # of the speed with all stages; less is chance
NUM_TOKENS: Final = 1200  # to simulate in all: 1 s, and up to 5 s of four very unequal models
_KEPT: Final = 0.95  # see `agreement`
_NUM_RANKED: Final = 16  # as many as `Schedule.outcomes` may be
_VOCAB_SIZE: Final = 4096
_VERY_LONG: Final = 1 << 30  # tokens in a forward


@dataclass(frozen=True, slots=True)
class WrittenText:
    """One text of an async-chain run. counts: of each stage, smallest draft first, target last.
    total_s: from submission to the last token."""

    counts: tuple[StageCounts, ...]
    total_s: float

    @property
    def num_tokens(self) -> int:
        """Of the output; the first is the prefill's."""
        return 1 + self.counts[-1].num_emitted


@dataclass(frozen=True, slots=True)
class Payoff:
    """tokens_per_s: with these stages, by index, and no others: measured for the ones that ran,
    estimated for each subset that has the target. num_tokens: that were measured."""

    tokens_per_s: Mapping[tuple[int, ...], float]
    num_tokens: int

    @property
    def whole(self) -> tuple[int, ...]:
        """The stages that ran."""
        return max(self.tokens_per_s, key=len)

    @property
    def best(self) -> tuple[int, ...]:
        """The stages to run: the fastest ones, if they gain more than `MIN_GAIN`."""
        fastest = max(self.tokens_per_s, key=self.tokens_per_s.__getitem__)
        least = (1.0 + MIN_GAIN) * self.tokens_per_s[self.whole]
        return fastest if self.tokens_per_s[fastest] > least else self.whole

    @property
    def not_paying(self) -> tuple[int, ...]:
        """The stages that are not among the best."""
        return tuple(stage for stage in self.whole if stage not in self.best)


def payoff(
    texts: Sequence[WrittenText], schedule: Schedule, greedy_tokens_per_s: float | None = None
) -> Payoff:
    """What an async-chain run of these texts says of every subset of its stages. Deterministic.

    greedy_tokens_per_s: of the target alone on the same prompts, where it was measured.
    """
    target = len(texts[0].counts) - 1
    whole, system = tuple(range(target + 1)), _system(texts)
    num_tokens = sum(text.num_tokens for text in texts)
    found = {whole: num_tokens / sum(text.total_s for text in texts)}
    # What the simulation does not know (processes that share a core, above all) grows with the
    # number of processes: it is right for the target alone, and off by this much for all stages.
    scale = found[whole] / system.predict(Choice(whole, "async-chain", schedule)).tokens_per_s
    for num_drafts in range(1, target):
        for drafts in combinations(range(target), num_drafts):
            choice = Choice((*drafts, target), "async-chain", schedule)
            simulated = system.predict(choice).tokens_per_s
            found[choice.stages] = scale ** (num_drafts / target) * simulated
    if greedy_tokens_per_s is None:
        greedy_tokens_per_s = system.predict(Choice((target,), "greedy")).tokens_per_s
    found[target,] = greedy_tokens_per_s
    return Payoff(found, num_tokens)


def step_times(stage: Sequence[StageCounts], default_s: float) -> MeasuredTimes:
    """How long forwards of a stage took, by number of tokens, prompts included.

    Medians: processes that share a core interrupt each other now and then, for many times as long
    as a forward takes. A longer forward never takes less: what contradicts that is chance, and is
    pooled. Outside of what was measured times are flat. default_s: of a stage that had not finished
    any forward.
    """
    forwards = [item for text in stage for item in zip(text.query_lengths, text.step_times_s)]
    forwards += [(text.num_prefill_tokens, text.prefill_s) for text in stage]
    points = _rising((length, seconds) for length, seconds in forwards if length)
    points = points or [(1, 1e3 * default_s)]
    return MeasuredTimes([(0, [*points, (_VERY_LONG, points[-1][1])])], ())


def acceptance(verifier: Sequence[StageCounts]) -> float:
    """The chance that a candidate is accepted which follows accepted ones; 0 if none was scored,
    for then its stage brought nothing. What follows a rejection was drafted on another text and
    says nothing. With `Schedule.tree` it is a lower bound: candidates beside the main path are
    rejected where that is accepted."""
    num_accepted = num_scored = 0
    for text in verifier:
        for offered, accepted, emitted in zip(text.offered, text.accepted, text.emitted):
            num_accepted += accepted
            num_scored += accepted + (accepted < min(offered, emitted))
    return ratio(num_accepted, num_scored) or 0.0


def agreement(between: Sequence[float]) -> float:
    """A guess at how often two stages agree, of how often neighbours from one to the other do.

    Only that of neighbours is measured by a run. The product would be it if mistakes had nothing to
    do with each other, but models find the same tokens hard: of the demo family, greedy or sampled,
    on its own text or on other text, draft and target agree 0.87 to 0.98 times as often as the less
    agreeing of the two pairs between them, and 1.3 to 1.8 times as often as the product says.
    """
    return max(math.prod(between), _KEPT ** (len(between) - 1) * min(between))


@dataclass(frozen=True, slots=True)
class _Oracles:
    """Of any of the stages. accepted: of each draft, the chance that a token is accepted by the
    stage after it. foreseen: of each draft, the shares of corrections that were its second, third,
    ... choice."""

    accepted: Sequence[float]
    foreseen: Sequence[Sequence[float]]

    def __call__(self, stages: tuple[int, ...]) -> Sequence[TokenOracle]:
        """All draw the same number of a prefix (`own` is 0), so the same tokens are hard for
        all: where a stage is wrong, those before it are rather wrong too."""
        found = [TraceOracle({}, _VOCAB_SIZE)]
        for stage, after in zip(stages[-2::-1], stages[:0:-1]):
            chance, foreseen = agreement(self.accepted[stage:after]), self.foreseen[stage]
            found.insert(0, TraceOracle({}, _VOCAB_SIZE, found[0], chance, foreseen))
        return found


def _system(texts: Sequence[WrittenText]) -> System:
    stages = list(zip(*(text.counts for text in texts)))
    longest_s = max(text.total_s for text in texts)
    foreseen = [_foreseen(stage) for stage in stages]
    models = []
    for index, stage in enumerate(stages):
        times = step_times(stage, longest_s)
        num_tail_rows = NUM_TAIL_ROWS if any(foreseen[index]) else 0
        models.append(PlanModel(str(index), times, times, num_tail_rows=num_tail_rows))
    return System(
        models=tuple(models),
        submits=_submits(texts, NUM_TOKENS >> (len(stages) - 1)),
        oracles=_Oracles([acceptance(stage) for stage in stages[1:]], foreseen),
    )


def _foreseen(stage: Sequence[StageCounts]) -> list[float]:
    """How often the right token is the second, third, ... choice of a draft that is wrong. Its hits
    do not tell, for it may not have had the time to prepare; this is the law of emulated models,
    which is that of the demo family. Nothing if it did not prepare at all."""
    if not any(text.num_outcome_hits for text in stage):
        return []
    missed = [number**-DEMO_RANK_EXPONENT for number in range(1, _NUM_RANKED + 2)]
    return [before - after for before, after in pairwise(missed)]


def _submits(texts: Sequence[WrittenText], num_tokens: int) -> tuple[Submit, ...]:
    """About so many tokens in texts of these lengths, again and again if they are few."""
    num_rounds = math.ceil(num_tokens / sum(text.num_tokens for text in texts))
    submits = []
    for number, text in enumerate([*texts] * num_rounds):
        prompt = (*range(text.counts[-1].num_prefill_tokens - 1), number)
        submits.append(Submit(number, prompt, (), SamplingParams(), text.num_tokens, (), ()))
    return sample(submits, num_tokens)


def _rising(forwards: Iterable[tuple[int, float]]) -> Points:
    """Median milliseconds by number of tokens, made to rise by pooling neighbours that fall."""
    by_length: dict[int, list[float]] = {}
    for length, seconds in forwards:
        by_length.setdefault(length, []).append(1e3 * seconds)
    pools: list[tuple[list[int], list[float]]] = []
    for length, times_ms in sorted(by_length.items()):
        pools.append(([length], times_ms))
        while len(pools) > 1 and median(pools[-2][1]) >= median(pools[-1][1]):
            lengths, more_ms = pools.pop()
            pools[-1] = (pools[-1][0] + lengths, pools[-1][1] + more_ms)
    return [(length, median(times_ms)) for lengths, times_ms in pools for length in lengths]
