"""Running estimates from noisy times: of steps by query length, of drafting after a mismatch.

Pure: what is measured is handed in. Both forget slowly what is long ago.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Final

_STEPS_REMEMBERED: Final = 24  # of each length, about
_TRIAL_EVERY: Final = 8  # mismatches of which nothing could be learnt, at first
_RAREST_TRIAL: Final = 64
_LIKENESS: Final = 0.25  # of numbers of tokens: their variance where they tell as much as a guess
_CYCLES_REMEMBERED: Final = 256
_CANDIDATE_COST: Final = 0.1  # a guess, in cycles without candidates
_GUESS_WEIGHT: Final = 4.0  # of that guess, in cycles with one candidate more or less
_PACE_SHARE: Final = 0.125  # of a cycle
_DISTURBED: Final = 1.5  # times as long as usual, and longer, a cycle says nothing more


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


class _Moments:
    """Decayed sums of a line of least squares: seconds by number of tokens."""

    def __init__(self) -> None:
        self.weight = self._num = self._seconds = self._num_num = self._num_seconds = 0.0

    def add(self, num: int, seconds: float, decay: float) -> None:
        """One more, before which all others count `decay` times as much as they did."""
        self.fade(decay)
        self.weight += 1.0
        self._num += num
        self._seconds += seconds
        self._num_num += num**2
        self._num_seconds += num * seconds

    def fade(self, decay: float) -> None:
        """All until now counts `decay` times as much as it did."""
        self.weight *= decay
        self._num *= decay
        self._seconds *= decay
        self._num_num *= decay
        self._num_seconds *= decay

    def means(self) -> tuple[float, float, float, float]:
        """Of numbers and seconds; the variance of numbers and their covariance with seconds."""
        num, seconds = self._num / self.weight, self._seconds / self.weight
        variance = max(0.0, self._num_num / self.weight - num**2)
        return num, seconds, variance, self._num_seconds / self.weight - num * seconds


class DraftTimes:
    """How long after a mismatch so many drafted tokens are there: a time to begin (the way of the
    verdict and back, the drafter's loop) and a time for each token.

    The line of least squares through what was seen, decayed. Where all was alike, it cannot tell
    the two apart: then about a third of the mean is the beginning.
    """

    def __init__(self) -> None:
        self._seen = _Moments()

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._seen.add(num_tokens, seconds, math.exp2(-num_tokens / 64.0))

    def forget(self) -> None:
        """Time passes and nothing is seen."""
        self._seen.fade(math.exp2(-1.0 / 64.0))

    def estimate(self) -> tuple[float, float] | None:
        """Seconds to begin, and for each token; None before the first observation."""
        if not self._seen.weight:
            return None
        num, seconds, variance, covariance = self._seen.means()
        usual = 0.7 * seconds / num
        slope = (covariance + usual * _LIKENESS) / (variance + _LIKENESS)
        slope = min(max(slope, 0.2 * usual), seconds / num)
        return max(0.0, seconds - slope * num), slope


class DraftWatch:
    """What a verifier sees of its drafter after a mismatch: how long tokens take, how many come
    first.

    A step hides when tokens came that are read after it, and later a drafter takes its time: it is
    ahead, and may prepare outcomes. So those count that came before the next step, or were read
    during it. num_first: running mean.
    """

    def __init__(self) -> None:
        self.times = DraftTimes()
        self.num_first = 1.0
        self._since_s: float | None = None
        self._num_tokens = 0  # since then, the last at
        self._until_s = 0.0
        self._num_hidden = 0
        self._trial_every = _TRIAL_EVERY

    @property
    def is_out_of_date(self) -> bool:
        """Who never waits learns nothing, and is to wait once: ever more rarely while that leads
        to no other waits."""
        return self._num_hidden >= self._trial_every

    def on_mismatch(self, now_s: float) -> None:
        """Drafting begins anew, from the correction token, a moment later."""
        self._since_s = now_s

    def on_draft(self, num_tokens: int, now_s: float) -> None:
        if self._since_s is None or not num_tokens:
            return
        if not self._num_tokens:
            self.num_first += (num_tokens - self.num_first) / 16.0
        self._num_tokens += num_tokens
        self._until_s = now_s

    def on_verification(self) -> None:
        """A step begins, or nothing follows."""
        if self._num_tokens:
            self._end(is_seen=True)

    def on_step_end(self, end_s: float) -> None:
        """What has come since the mismatch before it was read at `end_s` at the latest, or only
        after it."""
        if self._since_s is not None:
            self._end(is_seen=self._num_tokens > 0 and self._until_s < end_s)

    def _end(self, *, is_seen: bool) -> None:
        assert self._since_s is not None
        if is_seen:
            was_trial = self.is_out_of_date
            self._trial_every = (
                min(2 * self._trial_every, _RAREST_TRIAL) if was_trial else _TRIAL_EVERY
            )
            self._num_hidden = 0
            self.times.observe(self._num_tokens, self._until_s - self._since_s)
        else:
            self._num_hidden += 1
            self.times.forget()
        self._since_s, self._num_tokens = None, 0


class CycleTimes:
    """How long a synchronous chain takes from one verification to the next, by number of
    candidates: the line of least squares, decayed.

    A machine that is slow for a while must not look like candidates that are dear because so many
    were drafted just then. So times count in relation to the pace of the last few cycles, and only
    what lies close together in time is compared.
    """

    def __init__(self) -> None:
        self._seen = _Moments()
        self._pace = 1.0
        self._line = 0.0, 0.0

    def observe(self, num_candidates: int, seconds: float) -> None:
        usual_s = self.estimate(num_candidates) or seconds
        ratio = min(seconds / (usual_s * self._pace), _DISTURBED)
        self._pace *= ratio**_PACE_SHARE
        self._seen.add(num_candidates, ratio * usual_s, math.exp2(-1.0 / _CYCLES_REMEMBERED))
        num, mean_s, variance, covariance = self._seen.means()
        usual = _CANDIDATE_COST * mean_s / (1.0 + _CANDIDATE_COST * num)
        guessed = _GUESS_WEIGHT / self._seen.weight
        slope = (covariance + usual * guessed) / (variance + guessed)
        slope = min(max(slope, 0.1 * usual), 0.9 * mean_s / num)
        self._line = mean_s - slope * num, slope

    def estimate(self, num_candidates: int) -> float:
        """Seconds at the usual pace; 0 before the first observation."""
        return self._line[0] + self._line[1] * num_candidates


class Acceptance:
    """Running acceptance rate of candidates, from a prior of 0.7 that is worth eight tokens."""

    def __init__(self) -> None:
        self._num_scored = 8.0
        self._num_accepted = 5.6

    @property
    def rate(self) -> float:
        """Accepted / scored tokens."""
        return self._num_accepted / self._num_scored

    def observe(self, num_offered: int, num_accepted: int) -> None:
        """A verification: a rejection ends what can be learnt from it, so it counts for one scored
        token."""
        num_scored = min(num_offered, num_accepted + 1)
        decay = math.exp2(-num_scored / 64.0)
        self._num_scored = self._num_scored * decay + num_scored
        self._num_accepted = self._num_accepted * decay + num_accepted


def expected_tokens(acceptance: float, num_candidates: float) -> float:
    """Tokens that a verification of so many candidates emits, the bonus token included:
    (1 - a**(n+1)) / (1 - a). Leviathan et al., arXiv 2211.17192, equation 1."""
    if acceptance >= 1.0:
        return num_candidates + 1.0
    return (1.0 - math.pow(acceptance, num_candidates + 1)) / (1.0 - acceptance)
