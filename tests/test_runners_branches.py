"""Branches beside a text get what the same text gets in one line, and leave it alone, whatever
cache rows they are given.

For every runner that can feed them; of the native one the very bits are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipespec.config import SamplingParams
from pipespec.runners.base import Row, TailToken, TreeRow
from pipespec.runners.llama import LlamaRunner
from pipespec.runners.native import NativeRunner
from pipespec.runners.rows import draw_positions
from pipespec.sampling import rank
from tests.test_runners_llama import (  # noqa: F401
    CONTEXT_LENGTH,
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
from tests.test_runners_native import DTYPES, SHAPES, older_processors
from tests.test_runners_static import LONG, on_gpu, static
from tests.tiny import one_thread  # noqa: F401

SAMPLED = SamplingParams(temperature=0.7, seed=5)

Runner = LlamaRunner | NativeRunner
Load = Callable[[Path], Runner]
each_branching = pytest.mark.parametrize(
    ("load", "load_alone"),
    [(lean, lean), (static, lean), (native, native)],
    ids=["llama", "llama, static", "native"],
)


def grow(choice: random.Random, text: Sequence[int], first_row: int) -> list[TailToken]:
    """Branches off a text that has been or is being fed, of which some have branches."""
    tail: list[TailToken] = []
    for row in range(first_row, first_row + choice.randint(1, 9)):
        parents = [(at, at) for at in range(max(0, len(text) - 6), len(text))]
        parents += [(item.position, item.row) for item in tail]
        position, parent_row = choice.choice(parents)
        tail.append(TailToken(choice.randrange(VOCAB_SIZE), position + 1, row, parent_row))
    return tail


def path_of(item: TailToken, text: Sequence[int], tail: Sequence[TailToken]) -> list[int]:
    """All tokens that a branch token follows, and itself."""
    by_row = {other.row: other for other in tail}
    if item.parent_row in by_row:
        return [*path_of(by_row[item.parent_row], text, tail), item.token]
    return [*text[: item.parent_row + 1], item.token]


@each_branching
@pytest.mark.parametrize("variant", ["llama", "llama, ungrouped", "qwen3"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(2))
def test_a_branch_gets_what_its_text_gets_in_one_line(
    make: Make, load: Load, load_alone: Load, variant: str, sampling: SamplingParams, seed: int
) -> None:
    """All ranks are compared; for the native runner that is all that a step returns."""
    print(f"seed {seed}")
    choice, folder = random.Random(seed), make(variant)
    runner, linear = load(folder), load_alone(folder)
    text = random_ids(choice.randint(10, 40), seed)
    start, num_draws = choice.randint(1, len(text) - 1), 1
    feed(runner, text[:start])
    tail = grow(choice, text, first_row=len(text) + choice.randint(0, 30))
    row = Row(0, start, text[start:], num_draws, sampling)
    ranked = runner.forward_tree(TreeRow(row, tail, num_ranked=VOCAB_SIZE))
    paths = [text, *(path_of(item, text, tail) for item in tail)]
    assert len(ranked) == len(paths)
    for path, tokens in zip(paths, ranked, strict=True):
        last = Row(0, 0, path, 1, sampling)
        logits = linear.logits(last)
        [expected] = rank(logits, draw_positions(last), sampling, VOCAB_SIZE, VOCAB_SIZE)
        if load is native:
            assert tokens == expected
        else:  # near-ties may change places
            assert tokens[0] == expected[0]
            scores = logits[0, list(tokens)]
            assert sampling.temperature > 0 or (scores.diff() < 1e-4).all()


def ranks_in_one_line(runner: Runner, texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What follows each text, fed by itself."""
    rows = [Row(0, 0, ids, 1, GREEDY) for ids in texts]
    return [runner.forward_tree(TreeRow(row, (), num_ranked=3))[0] for row in rows]


def check_far_into_a_text(runner: Runner, alone: Runner) -> None:
    """Twice each, as a captured graph is captured and then replayed."""
    choice, text = random.Random(1), random_ids(300)
    for start in (3, 120, 250, 250, 60):
        runner.release(0)
        feed(runner, text[:start])
        end = start + choice.randint(1, 9)
        tail = grow(choice, text[:end], first_row=start + 10)
        tree = TreeRow(Row(0, start, text[start:end], 1, GREEDY), tail, num_ranked=3)
        paths = [text[:end], *(path_of(item, text, tail) for item in tail)]
        for _ in range(2):
            assert runner.forward_tree(tree) == ranks_in_one_line(alone, paths)


@each_branching
def test_far_into_a_text_branches_rank_what_their_texts_rank(
    make: Make, load: Load, load_alone: Load
) -> None:
    folder = make("llama", max_position_embeddings=LONG)
    check_far_into_a_text(load(folder), load_alone(folder))


def keep_a_branch(folder: Path, **options: Any) -> None:
    """Step by step two branches grow beside a text; one of them becomes the text."""
    ids, runner = random_ids(40), native(folder, **options)
    linear = feed(native(folder, **options), ids)
    feed(runner, ids[:20])
    rows: list[int] = []
    for step in range(4):
        row = Row(0, 20 + step, [7], 1, GREEDY)  # the own text goes another way
        parent = rows[-1] if rows else 19
        first = 50 + 2 * step
        tail = [
            TailToken(3, 20 + step, first, parent if step else 19),
            TailToken(ids[20 + step], 20 + step, first + 1, parent),
        ]
        rows.append(first + 1)
        _, _, ranked = runner.forward_tree(TreeRow(row, tail, num_ranked=VOCAB_SIZE))
        [expected] = rank(linear[20 + step, None], [0], GREEDY, VOCAB_SIZE, VOCAB_SIZE)
        assert ranked == expected
    rest = Row(0, 24, ids[24:30], 6, GREEDY)
    own = runner.forward_tree(TreeRow(rest, (), tuple(rows), 20, VOCAB_SIZE))
    assert own == rank(linear[24:30], range(25, 31), GREEDY, VOCAB_SIZE, VOCAB_SIZE)
    assert torch.equal(feed(runner, ids[30:], start=30), linear[30:])
    runner.close()


@DTYPES
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("variant", SHAPES)
def test_a_branch_that_is_kept_leaves_the_same_bits(
    make: Make, variant: str, dtype: str, num_threads: int
) -> None:
    keep_a_branch(make(variant), dtype=dtype, num_threads=num_threads)


@DTYPES
@pytest.mark.parametrize("march", older_processors())
def test_a_branch_that_is_kept_leaves_the_same_bits_on_an_older_processor(
    make: Make, dtype: str, march: str
) -> None:
    keep_a_branch(make("llama"), dtype=dtype, march=march)


def test_branches_reach_to_the_last_row_beside_a_full_context(make: Make) -> None:
    folder, ids = make("llama"), random_ids(CONTEXT_LENGTH)
    runner, linear = native(folder), feed(native(folder), ids)
    last, last_row = CONTEXT_LENGTH - 1, CONTEXT_LENGTH + runner.info.num_tail_rows - 1
    tail = [
        TailToken(ids[-2], last - 1, last_row - 1, last - 2),
        TailToken(ids[-1], last, last_row, last_row - 1),
    ]
    row = Row(0, 0, ids[:-2], 1, GREEDY)
    ranked = runner.forward_tree(TreeRow(row, tail, num_ranked=VOCAB_SIZE))
    assert ranked == rank(linear[-3:], range(3), GREEDY, VOCAB_SIZE, VOCAB_SIZE)
    end = Row(0, last, ids[-1:], 1, GREEDY)
    kept = TreeRow(end, (), (last_row - 1,), last - 1, VOCAB_SIZE)
    assert runner.forward_tree(kept) == ranked[2:]


@DTYPES
@pytest.mark.parametrize("variant", SHAPES)
def test_branches_beside_a_text_leave_its_bits_alone(make: Make, variant: str, dtype: str) -> None:
    choice, ids, folder = random.Random(0), random_ids(40), make(variant)
    linear = feed(native(folder, dtype=dtype), ids)
    runner = native(folder, dtype=dtype)
    for start, end in pairwise([0, 3, 4, 5, 13, 30]):
        row = Row(0, start, ids[start:end], end - start, GREEDY)
        tail = grow(choice, ids[:end], first_row=end + choice.randint(0, 40))
        ranked = runner.forward_tree(TreeRow(row, tail, num_ranked=VOCAB_SIZE))
        positions = draw_positions(row)
        expected = rank(linear[start:end], positions, GREEDY, VOCAB_SIZE, VOCAB_SIZE)
        assert ranked[: end - start] == expected
    assert torch.equal(feed(runner, ids[30:], start=30), linear[30:])


def test_branches_alone_can_be_fed(make: Make) -> None:
    runner, linear = native(make("llama")), native(make("llama"))
    ids = random_ids(12)
    feed(runner, ids)
    row = Row(0, len(ids), [], 0, GREEDY)
    tail = [TailToken(5, 12, 30, 11), TailToken(6, 13, 31, 30)]
    ranked = runner.forward_tree(TreeRow(row, tail, num_ranked=1))
    assert [[token] for (token,) in ranked] == [
        linear.forward([Row(0, 0, [*ids, 5], 1, GREEDY)])[0],
        linear.forward([Row(0, 0, [*ids, 5, 6], 1, GREEDY)])[0],
    ]


def test_a_static_tree_leaves_the_text_as_an_ordinary_one_does(make: Make) -> None:
    """The tokens that fill up a step are stored where nobody looks; a branch can be kept."""
    folder = make("llama")
    static_one, ordinary = static(folder), lean(folder)
    row = Row(0, 20, [1, 2, 3], 1, GREEDY)
    tail = [TailToken(7, 23, 40, 22), TailToken(8, 24, 41, 40), TailToken(9, 23, 42, 22)]
    kept = TreeRow(Row(0, 25, [3], 1, GREEDY), (), keep=[40, 41], keep_start=23, num_ranked=2)
    for runner in (static_one, ordinary):
        feed(runner, random_ids(20))
        runner.forward_tree(TreeRow(row, tail, num_ranked=2))
    assert static_one.forward_tree(kept) == ordinary.forward_tree(kept)
    expected = feed(ordinary, [5, 6], start=26)
    assert largest(feed(static_one, [5, 6], start=26) - expected) < 1e-5


def test_a_tree_that_is_too_large_for_a_static_step_is_fed_ordinarily(make: Make) -> None:
    folder = make("llama", max_position_embeddings=LONG)
    text = random_ids(60)
    tail = [TailToken(n, 60, 100 + n, 59) for n in range(8)]
    tree = TreeRow(Row(0, 0, text, 1, GREEDY), tail, num_ranked=3)
    runner = static(folder)
    paths = [text, *(path_of(item, text, tail) for item in tail)]
    assert runner.forward_tree(tree) == ranks_in_one_line(lean(folder), paths)
    assert runner._trees is not None and not runner._trees._forwards


# Rows that are used again


class Branches:
    """A runner that feeds branches beside a text, held against one that feeds each as a text."""

    def __init__(self, runner: Runner, alone: Runner):
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
        assert self._runner.forward_tree(tree) == ranks_in_one_line(self._alone, endings)


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
    folder = make("llama", max_position_embeddings=LONG)
    check_far_into_a_text(on_gpu(folder), lean(folder))
