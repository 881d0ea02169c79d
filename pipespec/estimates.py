"""Running estimates from noisy times: of steps by query length, of drafting after a mismatch.

Pure: what is measured is handed in. Both forget slowly what is long ago.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Final

_STEPS_REMEMBERED: Final = 24  # of each length, about
_LIKENESS: Final = 0.25  # of numbers of tokens: their variance where they tell as much as a guess


class StepTimes:
    """Running mean step time by query length, interpolated between the lengths seen.

    A longer step never takes less: who chooses the best of many noisy means would choose the
    luckiest, so neighbours that contradict each other are pooled (isotonic regression). Outside of
    the lengths seen it is hopeful, so that a policy tries what it has not measured: a longer step
    costs no more than the longest seen, a shorter one up to half less than the shortest.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, int]] = {}  # mean and count by length
        self._mean_s: dict[int, float] = {}  # pooled
        self._lengths: list[int] = []
        self._known: dict[int, float] = {}  # estimates since they were pooled
        self._num_unpooled = 0

    def observe(self, query_length: int, seconds: float) -> None:
        mean_s, count = self._seen.get(query_length, (seconds, 0))
        count = min(count + 1, _STEPS_REMEMBERED)
        self._seen[query_length] = mean_s + (seconds - mean_s) / count, count
        self._num_unpooled += 1
        if self._num_unpooled >= 8 or query_length not in self._mean_s:
            self._pool()

    def _pool(self) -> None:
        self._num_unpooled = 0
        self._known.clear()
        self._lengths = sorted(self._seen)
        blocks: list[tuple[float, int, int]] = []  # mean, count, how many lengths
        for length in self._lengths:
            mean_s, count = self._seen[length]
            size = 1
            while blocks and blocks[-1][0] > mean_s:
                other_s, others, more = blocks.pop()
                mean_s = (mean_s * count + other_s * others) / (count + others)
                count, size = count + others, size + more
            blocks.append((mean_s, count, size))
        pooled = [mean_s for mean_s, _, size in blocks for _ in range(size)]
        self._mean_s = dict(zip(self._lengths, pooled))

    @property
    def longest(self) -> int:
        """The longest query seen."""
        return self._lengths[-1] if self._lengths else 0

    def estimate(self, query_length: int) -> float | None:
        """Seconds; None before the first observation."""
        if not self._lengths:
            return None
        if query_length not in self._known:
            self._known[query_length] = self._interpolate(query_length)
        return self._known[query_length]

    def _interpolate(self, query_length: int) -> float:
        right = bisect_left(self._lengths, query_length)
        if right == len(self._lengths):
            return self._mean_s[self._lengths[-1]]
        above = self._lengths[right]
        if above == query_length:
            return self._mean_s[above]
        if right == 0:
            return self._mean_s[above] * 0.5 * (1.0 + query_length / above)
        below = self._lengths[right - 1]
        share = (query_length - below) / (above - below)
        return (1 - share) * self._mean_s[below] + share * self._mean_s[above]


class DraftTimes:
    """How long after a mismatch so many drafted tokens are there: a time to begin (the way of the
    verdict and back, the drafter's loop) and a time for each token.

    The line of least squares through what was seen, decayed. Where all was alike, it cannot tell
    the two apart: then about a third of the mean is the beginning.
    """

    def __init__(self) -> None:
        self._weight = self._num = self._seconds = self._num_num = self._num_seconds = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        decay = math.exp2(-num_tokens / 64.0)
        self._weight = self._weight * decay + 1.0
        self._num = self._num * decay + num_tokens
        self._seconds = self._seconds * decay + seconds
        self._num_num = self._num_num * decay + num_tokens**2
        self._num_seconds = self._num_seconds * decay + num_tokens * seconds

    def estimate(self) -> tuple[float, float] | None:
        """Seconds to begin, and for each token; None before the first observation."""
        if not self._weight:
            return None
        num, seconds = self._num / self._weight, self._seconds / self._weight
        variance = max(0.0, self._num_num / self._weight - num**2)
        covariance = self._num_seconds / self._weight - num * seconds
        usual = 0.7 * seconds / num
        slope = (covariance + usual * _LIKENESS) / (variance + _LIKENESS)
        slope = min(max(slope, 0.2 * usual), seconds / num)
        return max(0.0, seconds - slope * num), slope
