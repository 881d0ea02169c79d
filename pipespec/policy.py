"""When a stage verifies and how drafts are batched: pure decisions from measured numbers.

A verifier that starts on whatever is there loses to a synchronous chain when drafts are cheap:
after each mismatch it spends whole steps on no candidates. One that waits for the candidates worth
waiting for does not. A policy is told step times, acceptance and arrivals, and is asked how many
candidates to wait for; it reads no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate
from typing import NamedTuple, Protocol

from pipespec.config import Schedule
from pipespec.estimates import Acceptance, DraftWatch, StepTimes, expected_tokens
from pipespec.lookahead import AdaptiveLookahead
from pipespec.solo import Solo

SEND_COST_S = 60e-6  # of a draft's loop, beside its forwards; measured on Linux, ipc
FIRST_MOST = 16  # candidates to verify at once; more only after so many have been tried
_COUNTS = (*range(9), 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, *(16 * n for n in range(5, 257)))
_FEEDS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32)  # of the extras, how many are thought of
_MIN_CHANCE, _MAX_STEPS = 0.001, 16  # of steps between two mismatches that are thought of
EXTRA_COST_S = 10e-6  # of loops and messages, for each token fed beside the own text
MAX_URGENT = 4  # own tokens that the next stage may be waiting for


class Situation(NamedTuple):
    """What a verifier faces: candidates at hand, the most it could use, the time in seconds."""

    num_candidates: int
    num_useful: int
    now_s: float


class StepResult(NamedTuple):
    """A forward over `query_length` tokens, `num_offered` of them candidates of the main path of
    which it accepted `num_accepted`, that took `seconds`, ended at `end_s` and added `num_emitted`
    tokens (0 if a verdict had overtaken it). num_left: candidates that follow them. cycle_s: since
    the step before or, if that was later, the last verdict."""

    query_length: int
    num_offered: int
    num_accepted: int
    num_emitted: int
    num_left: int
    is_prefill: bool
    seconds: float
    end_s: float
    cycle_s: float = 0.0


class Offer(NamedTuple):
    """What a stage could feed in its next forward, and how many tokens that brings on average.

    own_length: tokens of its text and candidates (0: none may follow), worth `own_value` tokens.
    extra_values: of what could be fed beside it, best first: candidates of other branches, one more
    token of a prepared outcome. own_is_optional: there may be forwards without the own text.
    next_may_wait: the next stage has so few own tokens ahead that it may be waiting for more.
    """

    own_length: int
    own_value: float
    extra_values: tuple[float, ...]
    own_is_optional: bool
    next_may_wait: bool


class Policy(Protocol):
    """Decides for one stage."""

    batch: int  # tokens that a first draft collects before it sends them

    @property
    def is_alone(self) -> bool:
        """Whether a target keeps its tokens to itself."""
        ...

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        """Candidates to wait for, and for how many seconds at most (None: without limit)."""
        ...

    def use(self, num_candidates: int) -> int:
        """How many of so many candidates to verify now; the others stay for the next step."""
        ...

    def feed(self, offer: Offer) -> tuple[bool, int]:
        """Whether to feed the own text now, and how many of the extras beside it."""
        ...

    def on_step(self, result: StepResult) -> None:
        """A forward is done."""
        ...

    def on_draft(self, num_tokens: int, drafter_stopped: bool, now_s: float) -> None:
        """A Draft brought so many tokens on the held prefix; nothing follows if
        `drafter_stopped`."""
        ...


class FixedWait:
    """Wait for `num_candidates`: 0 is the original PipeSpec's "verify whatever is there", and
    without a time limit it is the synchronous chain."""

    def __init__(self, num_candidates: int, patience_s: float | None, batch: int = 1) -> None:
        self.num_candidates = num_candidates
        self.patience_s = patience_s
        self.batch = batch
        self.is_alone = False

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        return self.num_candidates, self.patience_s

    def use(self, num_candidates: int) -> int:
        return num_candidates

    def feed(self, offer: Offer) -> tuple[bool, int]:
        return offer.own_length > 0, len(offer.extra_values)

    def on_step(self, result: StepResult) -> None:
        pass

    def on_draft(self, num_tokens: int, drafter_stopped: bool, now_s: float) -> None:
        pass


def cycle_rate(
    acceptance: float,
    draft_s: float,
    steps: StepTimes,
    wait: int,
    most: int,
    *,
    begin_s: float = 0.0,
    loop_s: float = 0.0,
) -> float:
    """Tokens per second from one mismatch to the next, when a verifier waits for `wait` candidates.

    After a mismatch it waits `begin_s + wait * draft_s`, if it does, and verifies. If all is
    accepted and the next token drafted is the bonus token too (acceptance**(wait + 1)), it goes on
    with what was drafted during that step, at most `most`, which makes another step of another
    length, and so on until the next mismatch. loop_s: spent between any two steps, in a wait too.
    """
    step_s = steps.estimate(wait + 1)
    assert step_s is not None
    tokens, seconds = expected_tokens(acceptance, wait), step_s
    seconds += max(loop_s, begin_s + wait * draft_s if wait else 0.0)
    chance, num_steps = math.pow(acceptance, wait + 1), 1
    while chance > _MIN_CHANCE and num_steps < _MAX_STEPS:
        # On average, so not a whole number: the bonus token takes the place of one of them.
        ahead = max(0.0, min(most, step_s / max(draft_s, 1e-9)) - 1.0)
        step_s = steps.estimate(round(ahead) + 1)
        assert step_s is not None
        tokens += chance * expected_tokens(acceptance, ahead)
        seconds += chance * (step_s + loop_s)
        chance *= math.pow(acceptance, ahead + 1)
        num_steps += 1
    return tokens / seconds


class AdaptiveWait:
    """After a mismatch, wait for as many candidates as maximise tokens per second, and never verify
    more at once than pay for the longer step.

    None are waited for once so many are at hand. Acceptance, the time to draft a token and step
    times are running means of what this stage has seen. The stage above drafts on while this one
    verifies. may_be_alone: of a target that leaves its drafts while they only slow it down.
    """

    def __init__(
        self,
        max_candidates: int,
        *,
        patience_s: float = 1.0,
        may_be_alone: bool = False,
    ) -> None:
        self._max_candidates = max_candidates
        self._patience_s = patience_s
        self._steps = StepTimes()
        self._acceptance = Acceptance()
        self._drafts = DraftWatch()
        self._loop_s = self._last_end_s = 0.0
        self._num_steps = 0
        self._wanted = min(4, max_candidates)  # until something is measured; never far off
        self._most = min(FIRST_MOST, max_candidates)
        self._solo = Solo() if may_be_alone else None
        self.batch = 1

    @property
    def is_alone(self) -> bool:
        """See `Policy.is_alone`."""
        return self._solo is not None and self._solo.is_alone

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        wanted = max(0, min(self._wanted, situation.num_useful))
        if self.is_alone:
            return 0, None
        if wanted == 0 and self._drafts.is_out_of_date:
            wanted = min(1, situation.num_useful)
        missing = max(0, wanted - situation.num_candidates)
        return wanted, min(self._patience_s, 1e-3 + 4.0 * missing * self._draft_times()[1])

    def use(self, num_candidates: int) -> int:
        self._drafts.on_verification()
        return min(num_candidates, self._most)

    def feed(self, offer: Offer) -> tuple[bool, int]:
        """What brings most tokens per second: a long forward must be worth its time, and nobody
        must be kept waiting by it."""
        if self._steps.estimate(1) is None:
            return offer.own_length > 0, len(offer.extra_values)
        if offer.next_may_wait and offer.own_length and offer.own_is_optional:
            return True, self._num_free(offer.own_length, len(offer.extra_values))
        sums, most = list(accumulate(offer.extra_values, initial=0.0)), len(offer.extra_values)
        best, choice = -1.0, (True, 0)
        for count in (*_FEEDS[: bisect_left(_FEEDS, most)], most):
            if offer.own_length:
                seconds = self._steps.estimate(offer.own_length + count) or 1.0
                rate = (offer.own_value + sums[count]) / (seconds + count * EXTRA_COST_S)
                if rate > best:
                    best, choice = rate, (True, count)
            if count and (offer.own_is_optional or not offer.own_length):
                seconds = self._steps.estimate(count) or 1.0
                rate = sums[count] / (seconds + count * EXTRA_COST_S)
                if rate > best:
                    best, choice = rate, (False, count)
        return choice

    def _num_free(self, length: int, most: int) -> int:
        """How many tokens more, at most `most`, make a forward no longer."""
        own_s = self._steps.estimate(length) or 1.0
        count = most
        while count and (self._steps.estimate(length + count) or 1.0) > 1.03 * own_s:
            count //= 2
        return count

    def _draft_times(self) -> tuple[float, float]:
        """Seconds until drafting begins, and for each token; a guess until some was seen."""
        return self._drafts.times.estimate() or (0.0, (self._steps.estimate(1) or 0.1) / 8)

    def on_step(self, result: StepResult) -> None:
        self._drafts.on_step_end(result.end_s)
        self._observe_loop(result)
        if self._solo is not None:
            self._solo.on_step(result, self._steps.estimate(1) or 0.0)
        if result.is_prefill:
            return
        self._steps.observe(result.query_length, result.seconds)
        # A slow draft sends every token at once.
        self.batch = max(1, min(4, round(SEND_COST_S / (0.05 * max(result.seconds, 1e-6)))))
        if result.num_offered and result.num_emitted:
            self._acceptance.observe(result.num_offered, result.num_accepted)
            if result.num_accepted < result.num_offered and not result.num_left:
                self._drafts.on_mismatch(result.end_s)
        self._num_steps += 1
        is_due = self._num_steps % (4 if self._num_steps < 64 else 16) == 0
        if is_due and self._max_candidates:
            most = min(self._max_candidates, max(FIRST_MOST, 2 * self._steps.longest))
            counts = [count for count in _COUNTS if count < most] + [most]
            self._most = max(counts[1:], key=self._step_rate)
            fewer = [count for count in counts if count <= self._most]
            self._wanted = max(fewer, key=self._cycle_rate)

    def _step_rate(self, num_candidates: int) -> float:
        """Tokens per second of a step that verifies so many candidates."""
        step_s = self._steps.estimate(num_candidates + 1)
        assert step_s is not None
        return expected_tokens(self._acceptance.rate, num_candidates) / step_s

    def _cycle_rate(self, wait: int) -> float:
        begin_s, draft_s = self._draft_times()
        if wait:  # no fewer than come together
            wait = max(wait, round(self._drafts.num_first))
        args = (self._acceptance.rate, draft_s, self._steps, wait, self._most)
        return cycle_rate(*args, begin_s=begin_s, loop_s=self._loop_s)

    def _observe_loop(self, result: StepResult) -> None:
        """The shortest of late times between two steps, in which nothing was waited for."""
        between_s = max(0.0, result.end_s - result.seconds - self._last_end_s)
        self._loop_s = min(between_s, 1.02 * self._loop_s + 1e-6)
        self._last_end_s = result.end_s

    def on_draft(self, num_tokens: int, drafter_stopped: bool, now_s: float) -> None:
        self._drafts.on_draft(num_tokens, now_s)
        if drafter_stopped:
            self._drafts.on_verification()


def make_policy(
    schedule: Schedule, *, is_first: bool, is_last: bool = False, overlaps: bool = True
) -> Policy:
    """The policy of one stage; overlaps: False for `chain`."""
    patience_s = 1.0 if overlaps else None
    if schedule.policy == "pipespec":
        return FixedWait(schedule.lookahead or 0, patience_s)
    if is_first:
        return AdaptiveWait(0) if overlaps else FixedWait(0, None)
    if schedule.lookahead is not None:
        return FixedWait(schedule.lookahead, patience_s)
    if not overlaps:
        return AdaptiveLookahead(min(schedule.run_ahead, FIRST_MOST))
    return AdaptiveWait(schedule.run_ahead, may_be_alone=is_last)
