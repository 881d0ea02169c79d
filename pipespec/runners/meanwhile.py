"""What the processor does while a device computes a forward. Knows no device.

A GPU is told of a whole step and then waited for. That wait is given to who has something to do,
for less than the step will take: the device must not find nobody waiting when it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_SHARE: Final = 0.8  # of the shortest time that steps of so many tokens have lately taken
_GROWTH: Final = 1.01  # of that time, in each longer step: a device may slow down


class Meanwhile:
    """Gives the middle of a runner's steps away. do: is called with the seconds that it may take;
    None gives nothing away."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.do: Callable[[float], None] | None = None
        self._clock = clock
        self._least_s: dict[int, float] = {}  # tokens -> seconds
        self._until_s = 0.0

    @contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Around a whole step, from its launch until its draws are on the host."""
        start_s = self._clock()
        before_s = self._least_s.get(num_tokens)
        self._until_s = start_s + _SHARE * (before_s or 0.0)
        yield
        taken_s = self._clock() - start_s
        if before_s is not None:
            taken_s = min(taken_s, _GROWTH * before_s)
        self._least_s[num_tokens] = taken_s

    def launched(self) -> None:
        """To be called within the step once the device has been told of it."""
        left_s = self._until_s - self._clock()
        if self.do is not None and left_s > 0.0:
            self.do(left_s)
