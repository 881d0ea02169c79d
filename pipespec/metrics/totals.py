"""What one sample adds to the sums of its run: a few numbers in place of its lists and texts.

Reads an item of a result file's `results`, PipeSpec's own or the original's, as a plain dictionary;
what the original did not record is None. What is left of a sample takes less than a kilobyte, so
that a file of any size can be summarised (`results.read_runs` with `sample_totals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import fmean
from typing import Any

Result = Mapping[str, Any]  # one item of a result file's `results`


@dataclass(frozen=True, slots=True)
class PairTotals:
    """Counts of one pair of stages; the verifier's forwards that counted are `num_verifications`.
    See `counts.StageCounts` for the others."""

    num_emitted: int
    num_verifications: int
    num_accepted: int
    num_offered: int | None
    num_drafted: int | None
    num_rolled_back: int | None
    num_past_end: int | None
    num_corrections: int | None
    num_outcome_hits: int | None


@dataclass(frozen=True, slots=True)
class SampleTotals:
    """One sample. prompt, text: digests, for comparing samples. energy_j: by the devices' counters.
    gpu_powers_w, gpu_utilizations: the mean over the monitor's samples, by the GPU's index; None
    where a GPU was never read. pairs: the last is the target's; empty for greedy."""

    sample_index: int
    prompt: bytes
    text: bytes
    num_tokens: int
    total_time_s: float
    time_to_first_token_s: float | None
    num_target_forwards: int
    target_forward_s: float | None
    energy_j: float | None
    gpu_powers_w: tuple[float | None, ...]
    gpu_utilizations: tuple[float | None, ...]
    pairs: tuple[PairTotals, ...]


def sample_totals(result: Result) -> SampleTotals:
    """Of an item of `results`.

    Raises:
        KeyError, TypeError, ValueError, IndexError: its metrics are not those of a result file.
    """
    metrics = result["metrics"]
    return SampleTotals(
        sample_index=result["sample_index"],
        prompt=_digest(result["input_text"]),
        text=_digest(result["output_text"]),
        num_tokens=metrics["tokens_generated"],
        total_time_s=metrics["total_time"],
        time_to_first_token_s=_number(metrics, "time_to_first_token_s"),
        num_target_forwards=_num_target_forwards(metrics),
        target_forward_s=_last(metrics, "forward_times_s"),
        energy_j=_number(metrics, "energy_j"),
        gpu_powers_w=_means(result.get("gpustats", ()), "gpu_powers"),
        gpu_utilizations=_means(result.get("gpustats", ()), "gpu_utilizations"),
        pairs=tuple(
            _pair_totals(metrics, pair) for pair in range(len(metrics.get("accepted_tokens", ())))
        ),
    )


def _digest(text: str) -> bytes:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _number(values: Result, key: str) -> float | None:
    """None where it is not recorded."""
    value = values.get(key)
    if value is None or _is_number(value):
        return value
    raise ValueError(f'has no number "{key}"')


def _last(values: Result, key: str) -> float | None:
    """Of a list with one number a stage, the target's."""
    return _number({key: values[key][-1]}, key) if values.get(key) else None


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _num_target_forwards(metrics: Result) -> int:
    """Prefill included. The original logged the forwards after it only."""
    if "num_target_forwards" in metrics:
        return int(metrics["num_target_forwards"])
    times = metrics["model_times"][-1] if "model_times" in metrics else metrics["token_times"]
    return 1 + len(times)


def _pair_totals(metrics: Result, pair: int) -> PairTotals:
    """`accepted_tokens` counts the bonus or correction token, in both schemas; a step of ours that
    a verdict overtook has 0 there."""

    def count(name: str) -> int | None:
        return int(metrics[name][pair]) if name in metrics else None

    emitted = metrics["accepted_tokens"][pair]
    num_emitted, num_verifications = sum(emitted), sum(number > 0 for number in emitted)
    num_accepted = count("num_accepted")
    if num_accepted is None:  # the original: a verification emitted one token more than matched
        num_accepted = num_emitted - num_verifications
    return PairTotals(
        num_emitted=num_emitted,
        num_verifications=num_verifications,
        num_accepted=num_accepted,
        num_offered=count("num_offered"),
        num_drafted=count("num_drafted"),
        num_rolled_back=count("num_rolled_back"),
        num_past_end=count("num_past_end"),
        num_corrections=count("num_corrections"),
        num_outcome_hits=count("num_outcome_hits"),
    )


def _means(gpustats: Sequence[Result], key: str) -> tuple[float | None, ...]:
    """The mean of what was read of each GPU."""
    found = [stats.get(key) for stats in gpustats if isinstance(stats, Mapping)]
    rows = [row for row in found if isinstance(row, list)]
    columns: list[list[float]] = [[] for _ in range(max(map(len, rows), default=0))]
    for row in rows:
        for column, value in zip(columns, row):
            if _is_number(value):
                column.append(value)
    return tuple(fmean(column) if column else None for column in columns)
