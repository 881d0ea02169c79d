"""When a stage verifies and how drafts are batched: pure decisions from measured numbers.

A verifier that starts on whatever is there loses to a synchronous chain when drafts are cheap:
after each mismatch it spends whole steps on no candidates. One that waits for the candidates worth
waiting for does not. A policy is told step times, acceptance and arrivals, and is asked how many
candidates to wait for; it reads no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Protocol

from pipespec.config import Schedule

SEND_COST_S = 20e-6  # one socket call; measured on Linux, ipc


@dataclass(frozen=True, slots=True)
class Situation:
    """What a verifier faces: candidates at hand, the most it could use, the time in seconds."""

    num_candidates: int
    num_useful: int
    now_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """A forward over `query_length` tokens, `num_offered` of them candidates, that took `seconds`,
    ended at `end_s` and added `num_emitted` tokens (0 if a verdict had overtaken it)."""

    query_length: int
    num_offered: int
    num_emitted: int
    is_prefill: bool
    seconds: float
    end_s: float


class Policy(Protocol):
    """Decides for one stage."""

    batch: int  # tokens that a first draft collects before it sends them

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        """Candidates to wait for, and for how many seconds at most (None: without limit)."""
        ...

    def on_step(self, result: StepResult) -> None:
        """A forward is done."""
        ...

    def on_candidates(self, num_new: int, drafter_stopped: bool, now_s: float) -> None:
        """A Draft brought `num_new` candidates; nothing follows them if `drafter_stopped`."""
        ...


class FixedWait:
    """Wait for `num_candidates`: 0 is the original PipeSpec's "verify whatever is there", and
    without a time limit it is the synchronous chain."""

    def __init__(self, num_candidates: int, patience_s: float | None, batch: int = 1) -> None:
        self.num_candidates = num_candidates
        self.patience_s = patience_s
        self.batch = batch

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        return self.num_candidates, self.patience_s

    def on_step(self, result: StepResult) -> None:
        pass

    def on_candidates(self, num_new: int, drafter_stopped: bool, now_s: float) -> None:
        pass


class StepTimes:
    """Running mean step time by query length, interpolated between the lengths seen."""

    def __init__(self, weight: float = 0.2) -> None:
        self._weight = weight
        self._mean_s: dict[int, float] = {}
        self._lengths: list[int] = []

    def observe(self, query_length: int, seconds: float) -> None:
        mean_s = self._mean_s.get(query_length)
        if mean_s is None:
            self._mean_s[query_length] = seconds
            self._lengths = sorted(self._mean_s)
        else:
            self._mean_s[query_length] = mean_s + self._weight * (seconds - mean_s)

    def estimate(self, query_length: int) -> float | None:
        """Seconds; None before the first observation."""
        if not self._lengths:
            return None
        right = bisect_left(self._lengths, query_length)
        if right == len(self._lengths):
            return self._mean_s[self._lengths[-1]]
        above = self._lengths[right]
        if right == 0 or above == query_length:
            return self._mean_s[above]
        below = self._lengths[right - 1]
        share = (query_length - below) / (above - below)
        return (1 - share) * self._mean_s[below] + share * self._mean_s[above]


def expected_tokens(acceptance: float, num_candidates: int) -> float:
    """Tokens that a verification of so many candidates emits, the bonus token included:
    (1 - a**(n+1)) / (1 - a). Leviathan et al., arXiv 2211.17192, equation 1."""
    if acceptance >= 1.0:
        return num_candidates + 1.0
    return (1.0 - math.pow(acceptance, num_candidates + 1)) / (1.0 - acceptance)


class AdaptiveWait:
    """Wait for one more candidate as long as it is worth more than the time it takes.

    Candidate n + 1 brings a further token with probability acceptance**(n + 1) and costs the time
    to draft it plus what it adds to the step. Time is worth the tokens per second that the stage
    reaches on average (renewal-reward: local choices made against the long-run rate maximise that
    rate). So a verifier waits after a mismatch, by as much as drafts are cheap, and not at all
    while candidates are at hand. All numbers are running means of what this stage has seen.
    """

    def __init__(self, max_candidates: int, patience_s: float | None = 1.0) -> None:
        self._max_candidates = max_candidates
        self._patience_s = patience_s
        self._steps = StepTimes()
        self._num_scored = 8.0  # a prior of acceptance 0.7, worth eight tokens
        self._num_accepted = 5.6
        self._num_tokens = 0.0  # decayed, like the seconds in which they came
        self._seconds = 0.0
        self._last_end_s: float | None = None
        self._draft_s: float | None = None
        self._drafting_since_s: float | None = None
        self.batch = 1

    @property
    def acceptance(self) -> float:
        """Running acceptance rate."""
        return self._num_accepted / self._num_scored

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        most = max(0, min(self._max_candidates, situation.num_useful))
        step_s = self._steps.estimate(1)
        if step_s is None:  # nothing measured yet: a few candidates are never far off
            return min(4, most), self._patience_s
        draft_s = self._draft_s if self._draft_s is not None else step_s / 8
        wanted = situation.num_candidates
        while wanted < most and self._is_worth_waiting(wanted, draft_s):
            wanted += 1
        if self._patience_s is None:
            return wanted, None
        missing = max(0, wanted - situation.num_candidates)
        return wanted, min(self._patience_s, 1e-3 + 4.0 * missing * draft_s)

    def _is_worth_waiting(self, num_candidates: int, draft_s: float) -> bool:
        shorter_s = self._steps.estimate(num_candidates + 1)
        longer_s = self._steps.estimate(num_candidates + 2)
        assert shorter_s is not None and longer_s is not None
        cost_s = draft_s + max(0.0, longer_s - shorter_s)
        return math.pow(self.acceptance, num_candidates + 1) > self._rate(draft_s) * cost_s

    def _rate(self, draft_s: float) -> float:
        """Tokens per second, long-run; before there is one, that of a wait for four."""
        if self._seconds > 0.0:
            return self._num_tokens / self._seconds
        step_s = self._steps.estimate(5)
        assert step_s is not None
        return expected_tokens(self.acceptance, 4) / (4 * draft_s + step_s)

    def on_step(self, result: StepResult) -> None:
        last_end_s, self._last_end_s = self._last_end_s, result.end_s
        if result.is_prefill:
            return
        self._steps.observe(result.query_length, result.seconds)
        # About 5 % of a step's time may go into sends; a slow draft sends every token at once.
        self.batch = max(1, min(4, round(SEND_COST_S / (0.05 * max(result.seconds, 1e-6)))))
        if last_end_s is not None:
            self._num_tokens = self._num_tokens * 0.97 + result.num_emitted
            self._seconds = self._seconds * 0.97 + result.end_s - last_end_s
        if result.num_offered and result.num_emitted:
            self._observe_acceptance(result)

    def _observe_acceptance(self, result: StepResult) -> None:
        num_accepted = min(result.num_offered, result.num_emitted - 1)
        # A rejection ends what can be learnt from a step, so it counts for one scored token.
        num_scored = min(result.num_offered, num_accepted + 1)
        decay = math.exp2(-num_scored / 64.0)
        self._num_scored = self._num_scored * decay + num_scored
        self._num_accepted = self._num_accepted * decay + num_accepted
        if num_accepted < result.num_offered:
            self._drafting_since_s = result.end_s  # from the correction token, a moment later

    def on_candidates(self, num_new: int, drafter_stopped: bool, now_s: float) -> None:
        if num_new and self._drafting_since_s is not None:
            sample_s = (now_s - self._drafting_since_s) / num_new
            mean_s = self._draft_s if self._draft_s is not None else sample_s
            self._draft_s = mean_s + 0.1 * (sample_s - mean_s)
        # A drafter that stopped is idle for an unknown part of the time until the next draft.
        self._drafting_since_s = None if drafter_stopped else now_s


def make_policy(schedule: Schedule, *, is_first: bool, synchronous: bool = False) -> Policy:
    """The policy of one stage. synchronous: of `chain`, where every wait ends by itself, because
    the stage above drafts until it can no more."""
    patience_s = None if synchronous else 1.0
    if schedule.policy == "pipespec":
        return FixedWait(schedule.lookahead or 0, patience_s)
    if schedule.lookahead is not None and not is_first:
        return FixedWait(schedule.lookahead, patience_s)
    if synchronous and is_first:
        return FixedWait(0, None)
    return AdaptiveWait(schedule.run_ahead, patience_s)
