"""What may follow a stage's own tokens, as the stage before it drafted it: a path and its branches.

The `main` path is the drafter's own continuation. The branches that leave it are what the drafter
prepared for the case that a token of the main path is rejected: when the stage draws the first
token of such a branch, the rest of it becomes the main path, and no round trip was needed
(speculative speculative decoding, arXiv 2603.03251).

A branch is kept as it came and looked at when its case occurs: of those that arrive few are used.
A verification scores the main path and, where that pays, some of the branches' tokens beside it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pipespec.hashing import extend
from pipespec.messages import Draft

Path = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Twig:
    """A candidate beside the main path. before: what it follows, a twig or so many tokens of the
    main path. depth: candidates before it. value: how likely it is accepted."""

    token: int
    before: Twig | int
    depth: int
    value: float


class Candidates:
    """What follows a sequence of `length` tokens with this hash: at most `most` tokens are held.

    main: the tokens of the main path. Of the branches that leave it at a position and begin with
    the same token, the longest is kept. Positions are absolute.
    """

    __slots__ = ("_branches", "_hashes", "_length", "_most", "_num_beside", "main")

    def __init__(self, length: int, prefix_hash: int, most: int) -> None:
        self._most = most
        self.clear(length, prefix_hash)

    def __len__(self) -> int:
        """Tokens, of all branches."""
        return len(self.main) + self._num_beside

    def clear(self, length: int, prefix_hash: int) -> None:
        """Nothing follows the sequence of so many tokens with this hash."""
        self._length = length
        self._hashes = [prefix_hash]  # the n-th names what ends after n tokens of the main path
        self.main: list[int] = []
        self._branches: dict[int, dict[int, Path]] = {}  # by position and first token
        self._num_beside = 0

    @property
    def prefix_hash(self) -> int:
        """Of the sequence."""
        return self._hashes[0]

    @property
    def end(self) -> int:
        """The position after the main path."""
        return self._length + len(self.main)

    def has(self, position: int, prefix_hash: int) -> bool:
        """Whether what the main path puts before a position, not before its begin, has this
        hash."""
        return position <= self.end and self._hashes[position - self._length] == prefix_hash

    def paths(self) -> Iterator[Path]:
        """The tokens that lead to each of those held."""
        main = tuple(self.main)
        yield from (main[:count] for count in range(1, len(main) + 1))
        for position, branches in self._branches.items():
            before = main[: position - self._length]
            for path in branches.values():
                yield from ((*before, *path[:count]) for count in range(1, len(path) + 1))

    def add(self, position: int, tokens: Path) -> int:
        """The drafter's own text goes on with these at a position of the main path; returns how
        many of them there was no room for. What it said otherwise is void."""
        index = position - self._length
        known = common_length(self.main, index, tokens)
        if known < len(tokens) and index + known < len(self.main):
            self._cut(index + known)
        return self._extend(tokens[known:])

    def add_branch(self, position: int, tokens: Path) -> int:
        """These may follow instead from a position of the main path on; returns how many of them
        there was no room for. At its end they are the main path until it goes on otherwise."""
        known = common_length(self.main, position - self._length, tokens)
        position, tokens = position + known, tokens[known:]
        if position == self.end or not tokens:
            return self._extend(tokens)
        branches = self._branches.setdefault(position, {})
        num_held = len(branches.get(tokens[0], ()))
        taken = tokens[: max(0, num_held + self._most - len(self))]
        if len(taken) > num_held:
            branches[tokens[0]] = taken
            self._num_beside += len(taken) - num_held
        return len(tokens) - len(taken)

    def follow(self, token: int) -> bool:
        """The sequence grew by this token: keep what said so. True if that was the main path."""
        place, self._length = self._length, self._length + 1
        if not self.main:
            self._hashes[0] = extend(self._hashes[0], token)
            return False
        branches = self._branches.pop(place, {})
        if self.main[0] == token:
            del self.main[0], self._hashes[0]
            self._num_beside -= sum(map(len, branches.values()))
            return True
        self.clear(self._length, extend(self._hashes[0], token))
        self._extend(branches.get(token, ())[1:])
        return False

    def twigs(
        self, num_main: int, most: int, end: int, agreement: float, share: Callable[[int], float]
    ) -> list[Twig]:
        """The candidates beside the first `num_main` of the main path that are likeliest to be
        accepted, parents before children, at most `most`, with fewer than `end` before them.

        agreement: how often the main path is right. share: of the other cases, how many are those
        of an alternative, by its rank from 0.
        """
        found: list[Twig] = []
        reached = 1.0
        for place in range(num_main + 1):
            branches = self._branches.get(self._length + place, {})
            for rank, path in enumerate(branches.values()):
                before: Twig | int = place
                value = reached * (1.0 - agreement) * share(rank)
                for depth, token in enumerate(path[: max(0, end - place)], place):
                    before = Twig(token, before, depth, value)
                    found.append(before)
                    value *= agreement
            reached *= agreement
        return heapq.nlargest(most, found, key=lambda twig: twig.value)

    def rank(self, num_main: int, token: int) -> int | None:
        """Which alternative after so many of the main path the token is, counted from 0."""
        others = list(self._branches.get(self._length + num_main, ()))
        return others.index(token) if token in others else None

    def _extend(self, tokens: Path) -> int:
        """The main path goes on; returns how many of the tokens there was no room for."""
        taken = tokens[: max(0, self._most - len(self))]
        self.main += taken
        self._hashes += accumulate(taken, extend, initial=self._hashes.pop())
        return len(tokens) - len(taken)

    def _cut(self, length: int) -> None:
        """The main path ends after so many tokens, and no branch leaves it there or later."""
        del self.main[length:], self._hashes[length + 1 :]
        for position in [known for known in self._branches if known >= self.end]:
            self._num_beside -= sum(map(len, self._branches.pop(position).values()))


def branches_of(draft: Draft) -> Iterator[tuple[int, Path]]:
    """What the drafter prepared: branches, each with the position at which it leaves the own
    text."""
    tokens, parents, first = draft.tokens, draft.parents, draft.num_own
    begins = [n for n, parent in enumerate(parents, first) if parent != n - 1 or n == first]
    for begin, end in zip(begins, [*begins[1:], len(tokens)]):
        parent, path = parents[begin - first], tokens[begin:end]
        while parent >= first:  # it leaves another branch
            parent, path = parents[parent - first], (tokens[parent], *path)
        yield draft.start + parent + 1, path


def common_length(seq: Sequence[int], start: int, tokens: Sequence[int]) -> int:
    """How many of `tokens` equal `seq[start:]`, in order."""
    own = seq[start : start + len(tokens)]
    for count, (mine, theirs) in enumerate(zip(own, tokens)):
        if mine != theirs:
            return count
    return len(own)
