"""The definition of every metric, each in one place, as a function of plain numbers.

A metric whose denominator is zero is None: there is nothing to report. No function returns NaN or
infinity. This module knows neither stages nor files.

Names follow Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318) where those
define them; projects disagree on whether the bonus token counts, so each docstring says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def ratio(numerator: float, denominator: float) -> float | None:
    """The quotient; None where nothing was counted."""
    return numerator / denominator if denominator else None


def time_per_token(total_time_s: float, num_tokens: int) -> float | None:
    """Seconds from the submission of a prompt to its last token, divided by output tokens. The
    prefill is part of it."""
    return ratio(total_time_s, num_tokens)


def tokens_per_second(total_time_s: float, num_tokens: int) -> float | None:
    """Output tokens per second, prefill included: the inverse of `time_per_token`."""
    return ratio(num_tokens, total_time_s)


def speed_up_ratio(greedy_time_per_token_s: float, time_per_token_s: float) -> float | None:
    """Time per token of greedy, divided by that of the run, on the same prompts."""
    return ratio(greedy_time_per_token_s, time_per_token_s)


def acceptance_rate(num_accepted: int, num_offered: int) -> float | None:
    """Accepted, divided by drafted tokens that the verifier scored.

    Every token that was in a verification forward counts as scored, also those after the first
    mismatch. Drafts that arrived stale were not scored: they are counted apart.
    """
    return ratio(num_accepted, num_offered)


def mean_accepted_length(num_accepted: int, num_verifications: int) -> float | None:
    """Draft tokens accepted per verification, *without* the bonus or correction token. A
    verification that had no candidates counts, with 0."""
    return ratio(num_accepted, num_verifications)


def block_efficiency(num_emitted: int, num_verifications: int) -> float | None:
    """Tokens emitted per verification, *with* the bonus or correction token: the mean accepted
    length plus one, except where the text ended. The prefill and its token do not count."""
    return ratio(num_emitted, num_verifications)


def token_wastage(num_rolled_back: int, num_past_end: int, num_drafted: int) -> float | None:
    """Drafted tokens that never reached the output, divided by drafted tokens.

    Those are the ones that a verdict removed and the ones beyond the end of the output. Exact for
    the stage before the target; further up, a removed token may have been told by a verdict
    instead of drafted, so it is an upper bound there.
    """
    return ratio(min(num_rolled_back + num_past_end, num_drafted), num_drafted)


def outcome_hit_rate(num_outcome_hits: int, num_corrections: int) -> float | None:
    """Corrections for which the draft had prepared, divided by all that it was told: the hit rate
    of the speculation cache in speculative speculative decoding (arXiv 2603.03251), there counted
    over all verdicts."""
    return ratio(num_outcome_hits, num_corrections)


def efficiency_gain(num_tokens: int, num_target_forwards: int) -> float | None:
    """Target forwards per token of greedy, which is one, divided by those of the run. The prefill
    counts as one forward in both, so greedy has exactly 1."""
    return ratio(num_tokens, num_target_forwards)


def overhead(total_time_s: float, target_forward_s: float) -> float | None:
    """Time not covered by forwards of the target, prefill included, divided by the total time: what
    waiting for drafts, messages and bookkeeping cost."""
    share = ratio(total_time_s - target_forward_s, total_time_s)
    return None if share is None else max(0.0, share)


def energy_per_token(energy_j: float, num_tokens: int) -> float | None:
    """Joules by the devices' energy counters during generation, divided by output tokens."""
    return ratio(energy_j, num_tokens)


def energy_from_power(
    mean_powers_w: Sequence[float | None], gpus: Sequence[int], total_time_s: float
) -> float | None:
    """Joules, estimated as mean sampled power of `gpus` times the total time.

    For results without an energy counter; power is sampled too coarsely to integrate the short
    peaks. None without samples of one of those GPUs, which are indexes into `mean_powers_w`.
    """
    powers_w = [mean_powers_w[gpu] if gpu < len(mean_powers_w) else None for gpu in gpus]
    known_w = [power_w for power_w in powers_w if power_w is not None]
    return sum(known_w) * total_time_s if gpus and len(known_w) == len(gpus) else None


def part_means(counts: Mapping[int, int], num_parts: int) -> tuple[float | None, ...]:
    """Values in rising order, cut into parts of equal length, and the mean of each part.

    counts: how often each value stands there. The last part is shorter where the number of values
    is no multiple, and None where nothing is left for it.
    """
    left = sorted((value, count) for value, count in counts.items() if count)
    size = -(-sum(count for _, count in left) // num_parts)
    means: list[float | None] = []
    for _ in range(num_parts):
        total = taken = 0
        while left and taken < size:
            value, count = left.pop(0)
            used = min(count, size - taken)
            total, taken = total + used * value, taken + used
            if used < count:
                left.insert(0, (value, count - used))
        means.append(ratio(total, taken))
    return tuple(means)
