"""A run as a whole: sums over its samples, and its speed-up over greedy.

Reads the `results` of a result file, PipeSpec's own or the original's, as plain dictionaries; what
the original did not record is None. Every rate is a sum over a sum, so a long sample weighs more
than a short one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipespec.metrics import definitions

Result = Mapping[str, Any]  # one item of a result file's `results`


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Tuples have one item a pair of stages (empty for greedy); the last is the target's.

    time_to_first_token_s is the mean over samples, mean_utilization (percent, one item a stage) the
    mean over time; empty if it was not recorded. The definitions are in `metrics.definitions`.
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
    mean_utilization: tuple[float | None, ...]

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


def summarise(results: Sequence[Result]) -> Summary:
    """Sums over samples. Works on an empty run: every rate is None then."""
    metrics = [result["metrics"] for result in results]
    num_tokens = sum(sample["tokens_generated"] for sample in metrics)
    total_time_s = float(sum(sample["total_time"] for sample in metrics))
    num_forwards = _total(metrics, _num_target_forwards)
    target_s = _total(metrics, lambda sample: sample["forward_times_s"][-1])
    first_token_s = _total(metrics, lambda sample: sample["time_to_first_token_s"])
    energy_j = _total(metrics, lambda sample: sample["energy_j"])
    num_pairs = len(metrics[0].get("accepted_tokens", ())) if metrics else 0
    pairs = [_pair_rates(metrics, pair) for pair in range(num_pairs)]
    return Summary(
        num_samples=len(results),
        num_tokens=num_tokens,
        total_time_s=total_time_s,
        time_per_token_s=definitions.time_per_token(total_time_s, num_tokens),
        tokens_per_s=definitions.tokens_per_second(total_time_s, num_tokens),
        time_to_first_token_s=_apply(definitions.ratio, first_token_s, len(metrics)),
        num_target_forwards=None if num_forwards is None else int(num_forwards),
        efficiency_gain=_apply(definitions.efficiency_gain, num_tokens, num_forwards),
        overhead=_apply(definitions.overhead, total_time_s, target_s),
        energy_per_token_j=_apply(definitions.energy_per_token, energy_j, num_tokens),
        acceptance_rate=tuple(pair.acceptance_rate for pair in pairs),
        mean_accepted_length=tuple(pair.mean_accepted_length for pair in pairs),
        block_efficiency=tuple(pair.block_efficiency for pair in pairs),
        token_wastage=tuple(pair.token_wastage for pair in pairs),
        outcome_hit_rate=tuple(pair.outcome_hit_rate for pair in pairs),
        mean_utilization=_mean_utilization(metrics),
    )


def speed_up(run: Sequence[Result], greedy: Sequence[Result]) -> Comparison:
    """`run` against `greedy` on the same prompts only: same sample index and same input text.

    Runs of different length are common (the published 2.54x of PipeSpec divides the mean over ten
    greedy samples by the mean over twenty); matching makes the quotient mean what it says.
    """
    baseline = {_prompt(result): result for result in greedy}
    matched = [(result, baseline[_prompt(result)]) for result in run if _prompt(result) in baseline]
    differing = tuple(
        ours["sample_index"]
        for ours, theirs in matched
        if ours["output_text"] != theirs["output_text"]
    )
    ours_s = summarise([result for result, _ in matched]).time_per_token_s
    greedy_s = summarise([result for _, result in matched]).time_per_token_s
    if ours_s is None or greedy_s is None:
        return Comparison(None, len(matched), differing)
    return Comparison(definitions.speed_up_ratio(greedy_s, ours_s), len(matched), differing)


def energy_estimate_j(results: Iterable[Result], gpus: Sequence[int]) -> float | None:
    """Joules of a run from power samples, summed over `gpus` (indexes into `gpu_powers`).

    For files without an energy counter, the original's above all; None if a sample has no stats.
    """
    total_j = 0.0
    for result in results:
        total_time_s = result["metrics"]["total_time"]
        energy_j = definitions.energy_from_power(result["gpustats"], gpus, total_time_s)
        if energy_j is None:
            return None
        total_j += energy_j
    return total_j


def _prompt(result: Result) -> tuple[int, str]:
    return result["sample_index"], result["input_text"]


def _total(metrics: Sequence[Result], value: Callable[[Result], float | None]) -> float | None:
    """Sum of `value` over samples; None if there are none or one of them does not have it."""
    total = 0.0
    for sample in metrics:
        try:
            term = value(sample)
        except KeyError:
            return None
        if term is None:
            return None
        total += term
    return total if metrics else None


def _mean_utilization(metrics: Sequence[Result]) -> tuple[float | None, ...]:
    """Over the samples that know it: a stage that was left out in some did not idle in them."""
    columns = itertools.zip_longest(*(sample.get("mean_utilization", ()) for sample in metrics))
    times_s = [sample["total_time"] for sample in metrics]
    means: list[float | None] = []
    for column in columns:
        known = [(time_s, value) for time_s, value in zip(times_s, column) if value is not None]
        weighted = sum(time_s * value for time_s, value in known)
        means.append(definitions.ratio(weighted, sum(time_s for time_s, _ in known)))
    return tuple(means)


def _apply(definition: Callable[..., float | None], *totals: float | None) -> float | None:
    """`definition` of the totals; None if one of them was not recorded."""
    return None if None in totals else definition(*totals)


def _num_target_forwards(sample: Result) -> int:
    """Prefill included. The original logged the forwards after it only."""
    if "num_target_forwards" in sample:
        return int(sample["num_target_forwards"])
    decode_times = sample["model_times"][-1] if "model_times" in sample else sample["token_times"]
    return 1 + len(decode_times)


@dataclass(frozen=True, slots=True)
class _PairRates:
    acceptance_rate: float | None
    mean_accepted_length: float | None
    block_efficiency: float | None
    token_wastage: float | None
    outcome_hit_rate: float | None


def _pair_rates(metrics: Sequence[Result], pair: int) -> _PairRates:
    """Rates of one pair of stages. `accepted_tokens` counts the bonus or correction token, in
    both schemas; a step of ours that a verdict overtook has 0 there."""

    def total(name: str) -> float | None:
        return _total(metrics, lambda sample: sample[name][pair])

    emitted = [count for sample in metrics for count in sample["accepted_tokens"][pair]]
    num_emitted, num_verifications = sum(emitted), sum(count > 0 for count in emitted)
    num_accepted = total("num_accepted")
    if num_accepted is None:  # the original: a verification emitted one token more than matched
        num_accepted = num_emitted - num_verifications
    wasted = (total("num_rolled_back"), total("num_past_end"))
    return _PairRates(
        _apply(definitions.acceptance_rate, num_accepted, total("num_offered")),
        _apply(definitions.mean_accepted_length, num_accepted, num_verifications),
        _apply(definitions.block_efficiency, num_emitted, num_verifications),
        _apply(definitions.token_wastage, *wasted, total("num_drafted")),
        _apply(definitions.outcome_hit_rate, total("num_outcome_hits"), total("num_corrections")),
    )
