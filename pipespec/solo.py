"""Whether a target writes faster alone: measured, because no model of a pipeline knows its loops.

Drafts cost a target more than their forwards: it reads what they send, and they take memory
bandwidth and caches from it. Where acceptance is low that may be more than they bring. A target
that keeps its tokens to itself is alone soon: drafts stop at the bound of their run-ahead, and
nothing is left to read. One verdict, with all that was kept, brings them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pipespec.policy import StepResult

_WINDOW: Final = 48  # steps that a speed is measured over
_SHORT_WINDOW: Final = 16
_SETTLING: Final = 4  # steps after a change that do not count
_FIRST_STAY: Final = 64  # steps alone, four times as many after each trial that was slower
_LONGEST_STAY: Final = 1024
_MEMORY: Final = 32  # windows after which the speed alone is no longer believed


class Solo:
    """Decides whether the target is alone, from its steps' ends.

    Together for a window of steps; if that was slower than the shortest step might be, alone for a
    short one; then whatever was faster. Who is alone tries it together again, ever more rarely.
    """

    def __init__(self) -> None:
        self.is_alone = False
        self._is_trial = False
        self._stay = _FIRST_STAY
        self._alone_rate: float | None = None  # tokens per second
        self._together_rate = 0.0
        self._age = 0
        self._end_s: float | None = None  # of the last step of the same text
        self._begin(_WINDOW)

    def on_step(self, result: StepResult, least_s: float) -> None:
        """A step ended. least_s: no step alone takes less. Time between texts is no part of a
        measurement."""
        before_s, self._end_s = self._end_s, None if result.is_prefill else result.end_s
        if before_s is None or result.is_prefill:
            return
        self._num_steps += 1
        if self._num_steps <= _SETTLING:
            return
        self._num_tokens += result.num_emitted
        self._seconds += result.end_s - before_s
        if self._num_steps < _SETTLING + self._length or not self._seconds:
            return
        rate = self._num_tokens / self._seconds
        if self.is_alone:
            self._end_alone(rate)
        else:
            self._end_together(rate, least_s)

    def _end_alone(self, rate: float) -> None:
        self._alone_rate, self._age = rate, 0
        if self._is_trial and rate > self._together_rate:
            self._is_trial = False
            self._begin(self._stay)
        else:  # not worth it, or for long enough
            was_stay = not self._is_trial
            self.is_alone = False
            self._begin(_SHORT_WINDOW if was_stay else _WINDOW)

    def _end_together(self, rate: float, least_s: float) -> None:
        self._together_rate = rate
        self._age += 1
        if self._age > _MEMORY:
            self._alone_rate = None
        is_known = self._alone_rate is not None
        if self._alone_rate is not None and rate < self._alone_rate:
            self.is_alone, self._is_trial = True, False
            self._stay = min(4 * self._stay, _LONGEST_STAY)
            self._begin(self._stay)
        elif not is_known and rate * least_s < 1.0:
            self.is_alone = self._is_trial = True
            self._begin(_SHORT_WINDOW)
        else:
            self._stay = _FIRST_STAY
            self._begin(_WINDOW)

    def _begin(self, length: int) -> None:
        self._length = length
        self._num_steps = self._num_tokens = 0
        self._seconds = 0.0
