"""How many candidates a synchronous chain drafts before each verification: measured, not derived.

What a candidate costs is more than the draft's forward and a longer verification: the loop between
them, the messages, whoever reads the text. All of that is in the time from one verification to the
next, so that is what is measured, by number of candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipespec.estimates import Acceptance, CycleTimes, expected_tokens

if TYPE_CHECKING:
    from pipespec.policy import Offer, Situation, StepResult

_FIRST: Final = 4  # never far off
_CHOICE_EVERY: Final = 4  # cycles, after the first few
_ASIDE_EVERY: Final = 32  # cycles


class AdaptiveLookahead:
    """Waits for as many candidates as bring most tokens per second of a cycle: from the end of one
    verification to the end of the next.

    One of 32 cycles goes to some more or some fewer: what a candidate costs shows only where
    numbers differ, and near the best number that costs next to nothing.
    """

    batch = 1
    is_alone = False

    def __init__(self, max_candidates: int) -> None:
        self._max_candidates = max_candidates
        self._cycles = CycleTimes()
        self._acceptance = Acceptance()
        self._num_cycles = 0
        self._is_first = True  # of a text: drafts read the prompt
        self._best = self._wanted = min(_FIRST, max_candidates)

    def wait(self, situation: Situation) -> tuple[int, float | None]:
        return max(0, min(self._wanted, situation.num_useful)), None

    def use(self, num_candidates: int) -> int:
        return num_candidates

    def feed(self, offer: Offer) -> tuple[bool, int]:
        return offer.own_length > 0, len(offer.extra_values)

    def on_draft(self, num_tokens: int, drafter_stopped: bool, now_s: float) -> None:
        pass

    def on_step(self, result: StepResult) -> None:
        was_first, self._is_first = self._is_first, result.is_prefill
        if result.is_prefill:
            return
        if result.num_offered and result.num_emitted:
            self._acceptance.observe(result.num_offered, result.num_accepted)
        if was_first or not result.num_offered:
            return
        self._cycles.observe(result.num_offered, result.cycle_s)
        self._num_cycles += 1
        if self._num_cycles < 16 or self._num_cycles % _CHOICE_EVERY == 0:
            self._best = max(range(1, self._max_candidates + 1), key=self._rate)
        self._wanted = self._best
        if self._num_cycles % _ASIDE_EVERY == 0:
            far = 1 + self._best // 4
            aside = far if self._num_cycles % (2 * _ASIDE_EVERY) else -far
            self._wanted = max(1, min(self._best + aside, self._max_candidates))

    def _rate(self, num_candidates: int) -> float:
        """Tokens per second of cycles with so many candidates."""
        tokens = expected_tokens(self._acceptance.rate, num_candidates)
        return tokens / self._cycles.estimate(num_candidates)
