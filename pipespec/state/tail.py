"""Cache rows beyond the own text, for tokens that may never belong to it.

Alternatives are fed beside the own text in the same forward and stored behind every row that the
own text may reach meanwhile. If one of them turns out to be the text, its rows are copied; if not,
they are forgotten. Plain data: which rows are in use, not what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class TailToken(NamedTuple):
    """A token to feed beside the own text: it stands at absolute `position`, is stored in cache row
    `row`, and follows what is stored in row `parent_row` (the text's are its positions)."""

    token: int
    position: int
    row: int
    parent_row: int


class TailRows:
    """At most `count` rows in use at a time."""

    __slots__ = ("_used", "count")

    def __init__(self, count: int) -> None:
        self.count = count
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return self.count - len(self._used)

    def take(self, count: int, first: int, end: int) -> range:
        """The first `count` free rows side by side, as what is fed together must be stored, from
        row `first` on and before `end`; fewer, if there are not so many."""
        count = min(count, self.num_free)
        start, best = first, range(0)
        for row in (*sorted([used for used in self._used if first <= used < end]), end):
            if row - start > len(best):
                best = range(start, min(row, start + count))
            if len(best) == count:
                break
            start = row + 1
        self._used.update(best)
        return best

    def free(self, rows: Iterable[int]) -> None:
        self._used.difference_update(rows)
