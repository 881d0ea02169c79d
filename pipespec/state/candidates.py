"""What may follow a stage's own tokens, as the stage before it drafted it: a tree.

The path of first children is the drafter's own continuation, the `main` one. The other branches are
what it prepared for the case that a token of the main path is rejected: when the stage draws the
first token of such a branch, the rest of it becomes the main path, and no round trip was needed
(speculative speculative decoding, arXiv 2603.03251).

Nodes are found by the hash of the prefix that they end, so a draft may name any of them.

A verification scores the main path and, where that pays, some of the other nodes beside it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pipespec.hashing import extend


@dataclass(slots=True, eq=False)
class Node:
    """A candidate. prefix_hash: of everything up to and including it; children: best first."""

    token: int
    prefix_hash: int
    children: list[Node] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Twig:
    """A candidate beside the main path. before: what it follows, a twig or so many tokens of the
    main path. depth: candidates before it. value: how likely it is accepted."""

    token: int
    before: Twig | int
    depth: int
    value: float


class Candidates:
    """The tree below a sequence whose hash is `prefix_hash`.

    main: the tokens of the first path. Holds at most `most` nodes; more are not taken.
    """

    __slots__ = ("_end", "_most", "_nodes", "main", "root")

    def __init__(self, prefix_hash: int, most: int) -> None:
        self._most = most
        self.clear(prefix_hash)

    def __len__(self) -> int:
        """Nodes, of all branches."""
        return len(self._nodes) - 1

    def clear(self, prefix_hash: int) -> None:
        """Nothing follows the sequence with this hash."""
        self.root = self._end = Node(-1, prefix_hash)
        self._nodes = {prefix_hash: self.root}
        self.main: list[int] = []

    def paths(self) -> Iterator[tuple[int, ...]]:
        """The tokens from the root to each node, parents before children."""
        open_paths: list[tuple[Node, tuple[int, ...]]] = [(self.root, ())]
        while open_paths:
            node, path = open_paths.pop()
            for child in node.children:
                yield (*path, child.token)
                open_paths.append((child, (*path, child.token)))

    def twigs(
        self, num_main: int, most: int, end: int, agreement: float, share: Callable[[int], float]
    ) -> list[Twig]:
        """The candidates beside the first `num_main` of the main path that are likeliest to be
        accepted, parents before children, at most `most`, with fewer than `end` before them.

        agreement: how often the first child is right. share: of the other cases, how many are those
        of an alternative, by its rank from 0.
        """
        found: list[Twig] = []
        node, reached = self.root, 1.0
        for depth in range(num_main + 1):
            for rank, child in enumerate(node.children[1:]):
                value = reached * (1.0 - agreement) * share(rank)
                self._grow(found, Twig(child.token, depth, depth, value), child, end, agreement)
            reached *= agreement
            if node.children:
                node = node.children[0]
        return heapq.nlargest(most, found, key=lambda twig: twig.value)

    def _grow(self, found: list[Twig], twig: Twig, node: Node, end: int, agreement: float) -> None:
        """Adds a twig and the first children that follow it."""
        while twig.depth < end:
            found.append(twig)
            if not node.children:
                return
            node = node.children[0]
            twig = Twig(node.token, twig, twig.depth + 1, twig.value * agreement)

    def rank(self, path: Sequence[int], token: int) -> int | None:
        """Which alternative after this path the token is, counted from 0."""
        node = self.root
        for before in path:
            found = [child for child in node.children if child.token == before]
            if not found:
                return None
            node = found[0]
        others = [child.token for child in node.children[1:]]
        return others.index(token) if token in others else None

    def find(self, prefix_hash: int) -> Node | None:
        """The node that ends the prefix with this hash; the root ends the sequence itself."""
        return self._nodes.get(prefix_hash)

    def ends_main(self, node: Node) -> bool:
        """Whether nothing follows this node and it is the last of the main path."""
        return node is self._end

    def add(self, node: Node, token: int, *, is_own: bool = True) -> Node | None:
        """The child of `node` with this token, made if there was none; None if there is no room.

        is_own: it is of the drafter's own text, and so comes before what was only prepared.
        """
        children = node.children
        for child in children:
            if child.token == token:
                break
        else:
            if len(self._nodes) > self._most:
                return None
            child = Node(token, extend(node.prefix_hash, token))
            children.append(child)
            self._nodes[child.prefix_hash] = child
            if node is self._end:
                self._end = child
                self.main.append(token)
        if is_own and child is not children[0]:
            children.remove(child)
            children.insert(0, child)
            self.main = list(self._first_path(self.root))
        return child

    def follow(self, token: int, prefix_hash: int) -> bool:
        """The sequence grew by this token, to this hash: keep the branch that said so. True if it
        was the main one; without such a branch nothing is left."""
        old = self.root
        chosen = next((child for child in old.children if child.token == token), None)
        if chosen is None:
            self.clear(prefix_hash)
            return False
        for child in old.children:
            if child is not chosen:
                self._forget(child)
        del self._nodes[old.prefix_hash]
        self.root = chosen
        if chosen is old.children[0]:
            self.main.pop(0)
            return True
        self.main = list(self._first_path(chosen))
        return False

    def _first_path(self, node: Node) -> Iterator[int]:
        while node.children:
            node = node.children[0]
            yield node.token
        self._end = node

    def _forget(self, node: Node) -> None:
        dead = [node]
        for node in dead:
            del self._nodes[node.prefix_hash]
            dead += node.children
