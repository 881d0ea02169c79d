"""A run as a whole: sums over its samples, and its speed-up over greedy.

Reads the `results` of a result file, or what `totals.sample_totals` has kept of them. Every rate is
a sum over a sum, so a long sample weighs more than a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipespec.metrics import definitions
from pipespec.metrics.totals import PairTotals, Result, SampleTotals, sample_totals

T = TypeVar("T")
Sample = Result | SampleTotals


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Tuples have one item a pair of stages (empty for greedy); the last is the target's.

    time_to_first_token_s is the mean over samples. The definitions are in `metrics.definitions`.
    """

    num_samples: int
    num_tokens: int
    total_time_s: float
    time_per_token_s: float | None
    tokens_per_s: float | None
    time_to_first_token_s: float | None
    num_target_forwards: int | None
    efficiency_gain: float | None
    overhead: float | None
    energy_per_token_j: float | None
    acceptance_rate: tuple[float | None, ...]
    mean_accepted_length: tuple[float | None, ...]
    block_efficiency: tuple[float | None, ...]
    token_wastage: tuple[float | None, ...]
    outcome_hit_rate: tuple[float | None, ...]

    @property
    def ms_per_token(self) -> float | None:
        return None if self.time_per_token_s is None else self.time_per_token_s * 1000


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run against greedy on the prompts that both have. speed_up: None if there are none.

    differing: indexes of the samples whose texts are not the same.
    """

    speed_up: float | None
    num_matched: int
    differing: tuple[int, ...]

    @property
    def num_same_text(self) -> int:
        return self.num_matched - len(self.differing)


def summarise(samples: Iterable[Sample]) -> Summary:
    """Sums over samples. Works on an empty run: every rate is None then."""
    totals = _totals(samples)
    num_tokens = sum(sample.num_tokens for sample in totals)
    total_time_s = float(sum(sample.total_time_s for sample in totals))
    num_forwards = _total(totals, lambda sample: sample.num_target_forwards)
    target_s = _total(totals, lambda sample: sample.target_forward_s)
    first_token_s = _total(totals, lambda sample: sample.time_to_first_token_s)
    energy_j = _total(totals, lambda sample: sample.energy_j)
    num_pairs = min((len(sample.pairs) for sample in totals), default=0)
    pairs = [_pair_rates([sample.pairs[pair] for sample in totals]) for pair in range(num_pairs)]
    return Summary(
        num_samples=len(totals),
        num_tokens=num_tokens,
        total_time_s=total_time_s,
        time_per_token_s=definitions.time_per_token(total_time_s, num_tokens),
        tokens_per_s=definitions.tokens_per_second(total_time_s, num_tokens),
        time_to_first_token_s=_apply(definitions.ratio, first_token_s, len(totals)),
        num_target_forwards=None if num_forwards is None else int(num_forwards),
        efficiency_gain=_apply(definitions.efficiency_gain, num_tokens, num_forwards),
        overhead=_apply(definitions.overhead, total_time_s, target_s),
        energy_per_token_j=_apply(definitions.energy_per_token, energy_j, num_tokens),
        acceptance_rate=tuple(pair.acceptance_rate for pair in pairs),
        mean_accepted_length=tuple(pair.mean_accepted_length for pair in pairs),
        block_efficiency=tuple(pair.block_efficiency for pair in pairs),
        token_wastage=tuple(pair.token_wastage for pair in pairs),
        outcome_hit_rate=tuple(pair.outcome_hit_rate for pair in pairs),
    )


def speed_up(run: Iterable[Sample], greedy: Iterable[Sample]) -> Comparison:
    """`run` against `greedy` on the same prompts only: same sample index and same input text.

    Runs of different length are common (the published 2.54x of PipeSpec divides the mean over ten
    greedy samples by the mean over twenty); matching makes the quotient mean what it says.
    """
    baseline = {(sample.sample_index, sample.prompt): sample for sample in _totals(greedy)}
    matched = [
        (sample, theirs)
        for sample in _totals(run)
        if (theirs := baseline.get((sample.sample_index, sample.prompt))) is not None
    ]
    differing = tuple(ours.sample_index for ours, theirs in matched if ours.text != theirs.text)
    ours_s = summarise([sample for sample, _ in matched]).time_per_token_s
    greedy_s = summarise([sample for _, sample in matched]).time_per_token_s
    if ours_s is None or greedy_s is None:
        return Comparison(None, len(matched), differing)
    return Comparison(definitions.speed_up_ratio(greedy_s, ours_s), len(matched), differing)


def energy_estimate_j(samples: Iterable[Sample], gpus: Sequence[int]) -> float | None:
    """Joules of a run from power samples, summed over `gpus` (indexes into `gpu_powers`).

    For files without an energy counter, the original's above all; None if a sample has no stats.
    """
    return _total(
        _totals(samples),
        lambda sample: definitions.energy_from_power(
            sample.gpu_powers_w, gpus, sample.total_time_s
        ),
    )


def _totals(samples: Iterable[Sample]) -> list[SampleTotals]:
    return [
        sample if isinstance(sample, SampleTotals) else sample_totals(sample) for sample in samples
    ]


def _total(parts: Sequence[T], value: Callable[[T], float | None]) -> float | None:
    """Sum of `value` over parts; None if there are none or one of them does not have it."""
    terms = [value(part) for part in parts]
    known = [term for term in terms if term is not None]
    return float(sum(known)) if known and len(known) == len(terms) else None


def _apply(definition: Callable[..., float | None], *totals: float | None) -> float | None:
    """`definition` of the totals; None if one of them was not recorded."""
    return None if None in totals else definition(*totals)


@dataclass(frozen=True, slots=True)
class _PairRates:
    acceptance_rate: float | None
    mean_accepted_length: float | None
    block_efficiency: float | None
    token_wastage: float | None
    outcome_hit_rate: float | None


def _pair_rates(samples: Sequence[PairTotals]) -> _PairRates:
    """Rates of one pair of stages over all samples."""
    num_emitted = sum(pair.num_emitted for pair in samples)
    num_verifications = sum(pair.num_verifications for pair in samples)
    num_accepted = sum(pair.num_accepted for pair in samples)
    wasted = (
        _total(samples, lambda pair: pair.num_rolled_back),
        _total(samples, lambda pair: pair.num_past_end),
        _total(samples, lambda pair: pair.num_drafted),
    )
    hits = (
        _total(samples, lambda pair: pair.num_outcome_hits),
        _total(samples, lambda pair: pair.num_corrections),
    )
    num_offered = _total(samples, lambda pair: pair.num_offered)
    return _PairRates(
        _apply(definitions.acceptance_rate, num_accepted, num_offered),
        _apply(definitions.mean_accepted_length, num_accepted, num_verifications),
        _apply(definitions.block_efficiency, num_emitted, num_verifications),
        _apply(definitions.token_wastage, *wasted),
        _apply(definitions.outcome_hit_rate, *hits),
    )
