"""Branches beside a text: every runner that can feed them draws after each what it draws after a
text of the same tokens, whatever cache rows the branches are given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipespec.runners.base import Row, TailToken, TreeRow
from pipespec.runners.llama import LlamaRunner
from pipespec.runners.native import NativeRunner
from tests.test_runners_llama import (  # noqa: F401
    GREEDY,
    VOCAB_SIZE,
    Make,
    feed,
    largest,
    lean,
    make_fixture,
    native,
    random_ids,
)
from tests.test_runners_static import LONG, on_gpu, static
from tests.tiny import one_thread  # noqa: F401

Load = Callable[[Path], LlamaRunner | NativeRunner]
each_branching = pytest.mark.parametrize(
    ("load", "load_alone"),
    [(lean, lean), (static, lean), (native, native)],
    ids=["llama", "llama, static", "native"],
)


def random_tree(choice: random.Random, start: int, num_ids: int, first_row: int) -> TreeRow:
    """A row, and tokens that continue it or each other in all ways."""
    row = Row(0, start, choice.choices(range(VOCAB_SIZE), k=num_ids), 1, GREEDY)
    stands = {start + index: start + index for index in range(num_ids)}  # row -> position
    tail = []
    for at in range(first_row, first_row + choice.randint(1, 12)):
        parent = choice.choice(list(stands))
        stands[at] = stands[parent] + 1
        tail.append(TailToken(choice.randrange(VOCAB_SIZE), stands[at], at, parent))
    return TreeRow(row, tail, num_ranked=3)


def linear_ranks(
    runner: LlamaRunner | NativeRunner, text: list[int], tree: TreeRow
) -> list[tuple[int, ...]]:
    """What follows each token of the tree, of texts that are fed one by one."""
    path = {
        tree.row.start + index: [*tree.row.ids[: index + 1]] for index in range(len(tree.row.ids))
    }
    for item in tree.tail:
        path[item.row] = [*path[item.parent_row], item.token]
    last = tree.row.start + len(tree.row.ids) - 1
    ranks = []
    for tokens in (path[last], *(path[item.row] for item in tree.tail)):
        ids = [*text[: tree.row.start], *tokens]
        [found] = runner.forward_tree(TreeRow(Row(0, 0, ids, 1, GREEDY), (), num_ranked=3))
        ranks.append(found)
        runner.release(0)
    return ranks


@each_branching
@pytest.mark.parametrize("variant", ["llama", "llama, ungrouped", "qwen3"])
def test_branches_rank_what_the_same_texts_rank_one_by_one(
    make: Make, variant: str, load: Load, load_alone: Load
) -> None:
    choice = random.Random(variant)
    folder = make(variant, max_position_embeddings=LONG)
    runner, alone, text = load(folder), load_alone(folder), random_ids(300)
    for start in (3, 120, 250, 250, 60):
        runner.release(0)
        feed(runner, text[:start])
        tree = random_tree(choice, start, choice.randint(1, 9), start + 10)
        assert runner.forward_tree(tree) == linear_ranks(alone, text, tree)


def test_a_static_tree_leaves_the_text_as_an_ordinary_one_does(make: Make) -> None:
    """The tokens that fill up a step are stored where nobody looks; a branch can be kept."""
    folder, choice = make("llama"), random.Random(4)
    static_one, ordinary = static(folder), lean(folder)
    tree = random_tree(choice, 20, 3, 40)
    tail = [TailToken(7, 23, 40, 22), TailToken(8, 24, 41, 40), TailToken(9, 23, 42, 22)]
    kept = TreeRow(Row(0, 25, [3], 1, GREEDY), (), keep=[40, 41], keep_start=23, num_ranked=2)
    for runner in (static_one, ordinary):
        feed(runner, random_ids(20))
        runner.forward_tree(TreeRow(tree.row, tail, num_ranked=2))
    assert static_one.forward_tree(kept) == ordinary.forward_tree(kept)
    expected = feed(ordinary, [5, 6], start=26)
    assert largest(feed(static_one, [5, 6], start=26) - expected) < 1e-5


def test_a_tree_that_is_too_large_for_a_static_step_is_fed_ordinarily(make: Make) -> None:
    folder = make("llama", max_position_embeddings=LONG)
    row = Row(0, 0, random_ids(60), 1, GREEDY)
    tree = TreeRow(row, [TailToken(n, 60, 100 + n, 59) for n in range(8)], num_ranked=3)
    runner = static(folder)
    assert runner.forward_tree(tree) == linear_ranks(lean(folder), [], tree)
    assert runner._trees is not None and not runner._trees._forwards


# Rows that are used again


class Branches:
    """A runner that feeds branches beside a text, held against one that feeds each as a text."""

    def __init__(self, runner: LlamaRunner | NativeRunner, alone: LlamaRunner | NativeRunner):
        self._runner, self._alone = runner, alone
        self._choice = random.Random(0)
        self._endings: dict[int, list[int]] = {}  # by cache row: the text that ends there
        self.text = random_ids(12)
        feed(runner, self.text)

    def step(self, own: Sequence[int], *tail: tuple[int, int]) -> None:
        """Feeds tokens of the text, and one for each (row, parent row)."""
        row = Row(0, len(self.text), own, min(1, len(own)), GREEDY)
        self.text += own
        items, endings = [], [self.text] if own else []
        for at, parent in tail:
            before = self.text[: parent + 1] if parent < len(self.text) else self._endings[parent]
            token = self._choice.randrange(VOCAB_SIZE)
            self._endings[at] = [*before, token]
            items.append(TailToken(token, len(before), at, parent))
            endings.append(self._endings[at])
        self._compare(TreeRow(row, items, num_ranked=3), endings)

    def keep(self, rows: Sequence[int]) -> None:
        """Makes a branch the text, and feeds a token more."""
        ending = self._endings[rows[-1]]
        self.text = [*ending, 7]
        row = Row(0, len(ending), [7], 1, GREEDY)
        start = len(ending) - len(rows)
        self._compare(TreeRow(row, (), rows, start, num_ranked=3), [self.text])

    def _compare(self, tree: TreeRow, endings: Sequence[Sequence[int]]) -> None:
        alone = [TreeRow(Row(0, 0, ids, 1, GREEDY), (), num_ranked=3) for ids in endings]
        expected = [self._alone.forward_tree(each)[0] for each in alone]
        assert self._runner.forward_tree(tree) == expected


@each_branching
def test_two_branches_grow_in_turns_and_leave_their_rows_to_two_others(
    make: Make, load: Load, load_alone: Load
) -> None:
    folder = make("llama")
    branches = Branches(load(folder), load_alone(folder))
    for first, second in ((70, 71), (71, 70), (70, 71)):  # the others, too, change places
        branches.step([5], (70, len(branches.text)), (71, 3))
        for row in range(2, 12, 2):
            branches.step([], (first + row, first + row - 2))
            branches.step([], (second + row, second + row - 2))
        branches.step([6], (82, first + 10), (83, second + 10))
    branches.keep([second, *range(second + 2, second + 12, 2), 83])


@each_branching
def test_a_new_branch_may_lie_below_those_that_live_on(
    make: Make, load: Load, load_alone: Load
) -> None:
    folder = make("llama")
    branches = Branches(load(folder), load_alone(folder))
    ends = [100]
    branches.step([5], (100, 12))
    for first in (95, 90, 85, 80):
        branches.step([], (first, 8))
        for index, end in enumerate(ends):
            branches.step([], (end + 1, end))
            ends[index] = end + 1
        ends.append(first)
    branches.keep(range(100, ends[0] + 1))


@each_branching
@pytest.mark.parametrize("seed", range(3))
def test_branches_come_fork_grow_and_end_at_random(
    make: Make, load: Load, load_alone: Load, seed: int
) -> None:
    print(f"seed {seed}")
    choice, folder = random.Random(seed), make("llama", max_position_embeddings=LONG)
    branches = Branches(load(folder), load_alone(folder))
    alive: list[list[int]] = []  # the rows of each, of which some are those of another as well
    for _ in range(30):
        while len(alive) > choice.randint(1, 6):
            alive.remove(choice.choice(alive))
        own = choice.choices(range(VOCAB_SIZE), k=choice.choice([0, 0, 1, 3]))
        growing = choice.sample(alive, k=choice.randint(0, len(alive)))
        starting: list[list[int]] = [[] for _ in range(choice.randint(0 if growing else 1, 3))]
        count = len(growing) + len(starting)
        used = {row for rows in alive for row in rows}
        lowest = max([230, *(rows[-1] + 1 for rows in growing)])
        places = [n for n in range(lowest, 700) if used.isdisjoint(range(n, n + count))]
        first, num_own = choice.choice(places[:12]), len(branches.text) + len(own)
        fed = [*growing, *starting]
        parents = [rows[-1] if rows else choice.randrange(num_own) for rows in fed]
        branches.step(own, *zip(range(first, first + count), parents, strict=True))
        grown = [[*rows, first + index] for index, rows in enumerate(fed)]
        kept = [rows for rows in alive if rows not in growing or choice.random() < 0.3]
        alive = [*kept, *grown]
    branches.keep(max(alive, key=len))


# On a GPU


@pytest.mark.gpu
def test_branches_on_a_gpu_rank_what_the_cpu_ranks(make: Make) -> None:
    choice, folder = random.Random(1), make("llama", max_position_embeddings=LONG)
    runner, alone, text = on_gpu(folder), lean(folder), random_ids(300)
    for start in (3, 120, 250, 250, 60):
        runner.release(0)
        feed(runner, text[:start])
        tree = random_tree(choice, start, choice.randint(1, 9), start + 10)
        for _ in range(2):
            assert runner.forward_tree(tree) == linear_ranks(alone, text, tree)
