"""A KV cache that holds token ids: each row knows its token and the hash of what it ends."""

from __future__ import annotations

from collections.abc import Sequence

from pipespec.hashing import ROOT, extend


class Cache:
    """Rows of one request, written as a runner writes them, rightly or wrongly."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, int]] = {}

    def hash_of(self, row: int) -> int:
        """The hash of the prefix that the row ends; row -1 ends the empty one."""
        return self._rows[row][1] if row >= 0 else ROOT

    def feed(self, row: int, token: int, parent_row: int) -> int:
        """Store a token that follows another row; returns the hash of the prefix it ends."""
        prefix_hash = extend(self.hash_of(parent_row), token)
        self._rows[row] = (token, prefix_hash)
        return prefix_hash

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Copy rows to `start` and after."""
        self._rows.update({start + n: self._rows[row] for n, row in enumerate(rows)})

    def tokens(self, length: int) -> list[int]:
        """The tokens in the first rows."""
        return [self._rows[row][0] for row in range(length)]

    def is_path(self, length: int) -> bool:
        """Whether each of the first rows was computed on those before it."""
        return all(
            self._rows[row][1] == extend(self.hash_of(row - 1), self._rows[row][0])
            for row in range(length)
        )
