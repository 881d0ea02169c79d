"""How long a forward takes: tables of measured milliseconds, and what lies between their entries.

Pure. Knows neither what measured them nor the clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipespec.emulation import Emulation

Points = Sequence[tuple[int, float]]  # (a number of tokens, milliseconds), sorted


class Times(Protocol):
    """Step times of one model where it runs."""

    def forward_s(self, num_tokens: int, context: int, *, prepares: bool = False) -> float:
        """Seconds of a forward over `num_tokens` tokens in a text of about `context` tokens.
        prepares: some of them may be in branches, and the choices after each are ranked, as a
        draft does it for `Schedule.outcomes`."""
        ...


@dataclass(frozen=True, slots=True)
class MeasuredTimes:
    """What was measured of a model.

    decode: by context length, then by number of tokens. prefill: of whole prompts, by length; used
    for more tokens than `decode` has. branching: like `decode`, with all tokens but one in
    branches: the number of rows stands for a forward, however they follow each other. Empty for a
    runner that has no branches.
    """

    decode: Sequence[tuple[int, Points]]
    prefill: Points
    branching: Sequence[tuple[int, Points]] = ()

    def forward_s(self, num_tokens: int, context: int, *, prepares: bool = False) -> float:
        """See `Times`."""
        longest, _ = self.decode[0][1][-1]
        if num_tokens > longest and self.prefill:
            return interpolate(self.prefill, num_tokens) / 1e3
        table = self.branching if prepares and self.branching else self.decode
        by_context = [(at, interpolate(points, num_tokens)) for at, points in table]
        return interpolate(by_context, context) / 1e3


@dataclass(frozen=True, slots=True)
class EmulatedTimes:
    """The table of an emulated model."""

    emulation: Emulation

    def forward_s(self, num_tokens: int, context: int, *, prepares: bool = False) -> float:
        """See `Times`; neither the context nor branches cost anything."""
        return self.emulation.forward_s(num_tokens)


def interpolate(points: Points, at: int) -> float:
    """Linear between the points; the first value before them; beyond the last, on along the last
    two, but never below it."""
    positions = [position for position, _ in points]
    right = bisect_left(positions, at)
    if right == 0:
        return points[0][1]
    if right == len(points):
        if len(points) == 1:
            return points[0][1]
        right -= 1
    (low, low_value), (high, high_value) = points[right - 1], points[right]
    value = low_value + (at - low) / (high - low) * (high_value - low_value)
    return value if at <= high else max(value, high_value)
