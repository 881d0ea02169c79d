"""Branches beside a text get what the same text gets in one line, and leave it alone.

For both lean runners; of the native one the very bits are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipespec.config import SamplingParams
from pipespec.runners.base import BranchingRunner, Row, TailToken, TreeRow
from pipespec.runners.rows import draw_positions
from pipespec.sampling import rank
from tests.test_runners_llama import (  # noqa: F401
    CONTEXT_LENGTH,
    GREEDY,
    VOCAB_SIZE,
    Loader,
    Make,
    each_lean,
    feed,
    make_fixture,
    native,
    random_ids,
)
from tests.test_runners_native import DTYPES, SHAPES, older_processors
from tests.tiny import one_thread  # noqa: F401

SAMPLED = SamplingParams(temperature=0.7, seed=5)


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


@each_lean
@pytest.mark.parametrize("variant", ["llama", "llama, ungrouped", "qwen3"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(4))
def test_a_branch_gets_what_its_text_gets_in_one_line(
    make: Make, load: Loader, variant: str, sampling: SamplingParams, seed: int
) -> None:
    """All ranks are compared; for the native runner that is all that a step returns."""
    print(f"seed {seed}")
    choice, folder = random.Random(seed), make(variant)
    runner, linear = load(folder), load(folder)
    assert isinstance(runner, BranchingRunner)
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


@each_lean
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_branches_are_reused_in_any_order(make: Make, load: Loader, seed: int) -> None:
    """Only within a branch do rows ascend."""
    print(f"seed {seed}")
    choice, text = random.Random(seed), random_ids(20, seed)
    runner, linear = load(make("llama")), load(make("llama"))
    assert isinstance(runner, BranchingRunner)
    feed(runner, text)
    held: dict[int, tuple[list[int], set[int]]] = {}  # by row: its text, and the rows it sees
    for _ in range(15):
        first = choice.randint(len(text) + 1, len(text) + 24)
        rows = range(first, first + choice.randint(1, 4))
        held = {row: of for row, of in held.items() if of[1].isdisjoint(rows)}
        tail = []
        for row in rows:
            parent = choice.choice([len(text) - 1, *(other for other in held if other < row)])
            path, seen = held.get(parent, (text, set()))
            token = choice.randrange(VOCAB_SIZE)
            tail.append(TailToken(token, len(path), row, parent))
            held[row] = ([*path, token], {*seen, row})
        ranked = runner.forward_tree(TreeRow(Row(0, len(text), [], 0, GREEDY), tail))
        for item, (drawn,) in zip(tail, ranked, strict=True):
            assert [[drawn]] == linear.forward([Row(0, 0, held[item.row][0], 1, GREEDY)])


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
