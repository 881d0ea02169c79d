"""Forwards that a runner does by itself, in one call, are those that it would be asked for one by
one: to the bit, and with the same cache after them.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipespec.config import SamplingParams
from pipespec.errors import PipeSpecError
from pipespec.runners.base import BurstRow, Row, TailToken, TreeRow
from pipespec.runners.native import NativeRunner
from tests.test_runners_llama import (  # noqa: F401
    CONTEXT_LENGTH,
    GREEDY,
    VOCAB_SIZE,
    Make,
    feed,
    make_fixture,
    native,
    random_ids,
)
from tests.test_runners_native import DTYPES
from tests.tiny import make_tiny, one_thread  # noqa: F401

Draws = list[tuple[int, ...]]


def one_by_one(runner: NativeRunner, burst: BurstRow) -> tuple[list[Draws], list[list[TailToken]]]:
    """What each forward draws, and what it feeds beside the text."""
    tree, rounds = burst.tree, list(burst.rounds)
    row, tail = tree.row, list(tree.tail)
    draws, tails = [runner.forward_tree(tree)], [tail]
    for _ in range(burst.num_more):
        has_own, drawn, first_row = bool(row.ids), draws[-1], tail[-1].row + 1 if tail else 0
        goes_on = [index for index, count in enumerate(rounds) if count]
        tail = [
            TailToken(
                drawn[has_own + index][0], tail[index].position + 1, first_row + n, tail[index].row
            )
            for n, index in enumerate(goes_on)
        ]
        rounds = [rounds[index] - 1 for index in goes_on]
        end = row.start + len(row.ids)
        row = Row(0, end, [drawn[0][0]] if has_own else [], int(has_own), row.sampling)
        if not row.ids and not tail:
            break
        draws.append(runner.forward_tree(TreeRow(row, tail, num_ranked=tree.num_ranked)))
        tails.append(tail)
    return draws, tails


@dataclass
class Scene:
    """A text with branches beside it, of which one is to be kept, and a burst over both."""

    text: list[int]
    before: TreeRow
    burst: BurstRow

    @classmethod
    def random(cls, seed: int) -> Scene:
        choice, text = random.Random(seed), random_ids(random.Random(seed).randint(5, 20), seed)
        length, first = len(text), 40 + choice.randint(0, 9)
        others = [
            TailToken(choice.randrange(VOCAB_SIZE), length, first, length - 1),
            TailToken(choice.randrange(VOCAB_SIZE), length, first + 1, length - 1),
            TailToken(choice.randrange(VOCAB_SIZE), length + 1, first + 2, first + 1),
        ]
        before = TreeRow(Row(0, length - 1, text[-1:], 1, GREEDY), others)
        start, kept = length + 2, (first + 1, first + 2)
        text += [item.token for item in others[1:]]
        own = random_ids(choice.choice([0, 1, 1, 3]), seed + 1)
        num_tail, num_more = choice.randint(0 if own else 1, 6), choice.randint(1, 5)
        tail, row = list[TailToken](), first + 3 + choice.randint(0, 9)
        for index in range(num_tail):
            if choice.random() < 0.2:  # goes on from what was fed before, not from the text
                position, parent = length + 1, first
            else:
                position = choice.randint(length - 3, start + len(own))
                parent = position - 1
            tail.append(TailToken(choice.randrange(VOCAB_SIZE), position, row + index, parent))
        rounds = sorted((choice.randint(0, num_more) for _ in tail), reverse=True)
        given = Row(0, start, own, min(1, len(own)), GREEDY)
        tree = TreeRow(given, tail, kept, length, num_ranked=choice.randint(1, 5))
        return cls(text, before, BurstRow(tree, rounds, num_more))

    def set(self, runner: NativeRunner) -> None:
        """Feeds what the burst finds."""
        feed(runner, self.text[: self.before.row.start])
        runner.forward_tree(self.before)


def what_is_left(
    runner: NativeRunner, burst: BurstRow, draws: Sequence[Draws], tails: Sequence[list[TailToken]]
) -> list[Draws]:
    """What is drawn after each row that the burst left, and once its longest branch is the text."""
    end, has_own = burst.tree.row.start + len(burst.tree.row.ids), bool(burst.tree.row.ids)
    end += (len(draws) - 1) * has_own
    fed = [item for tail in tails for item in tail]
    first = 1 + max([60, *(item.row for item in fed)])
    after = [TailToken(5, item.position + 1, first + n, item.row) for n, item in enumerate(fed)]
    own = Row(0, end, [draws[-1][0][0]], 1, GREEDY) if has_own else Row(0, end, [], 0, GREEDY)
    left: list[Draws] = []
    if own.ids or after:
        left.append(runner.forward_tree(TreeRow(own, after, num_ranked=VOCAB_SIZE)))
    if fed:
        by_row = {item.row: item for item in fed}
        path = [max(fed, key=lambda item: item.position)]
        while path[0].parent_row in by_row:
            path.insert(0, by_row[path[0].parent_row])
        if path[0].parent_row == path[0].position - 1:
            row = Row(0, path[-1].position + 1, [7], 1, GREEDY)
            rows, start = [item.row for item in path], path[0].position
            left.append(runner.forward_tree(TreeRow(row, (), rows, start, VOCAB_SIZE)))
    return left


@DTYPES
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_burst_is_its_forwards_one_by_one_to_the_bit(
    make: Make, dtype: str, num_threads: int
) -> None:
    folder = make("llama")
    alone = native(folder, dtype=dtype)
    runner = native(folder, dtype=dtype, num_threads=num_threads)
    for seed in range(40):
        print(f"seed {seed}")
        scene = Scene.random(seed)
        for one in (alone, runner):
            one.release(0)
            scene.set(one)
        expected, tails = one_by_one(alone, scene.burst)
        drawn = runner.forward_burst(scene.burst)
        assert drawn == expected
        args = scene.burst, drawn, tails
        assert what_is_left(runner, *args) == what_is_left(alone, *args)
    runner.close()


def test_a_long_row_before_a_burst_is_fed_in_chunks(make: Make) -> None:
    folder = make("llama", max_position_embeddings=700)
    tail = [TailToken(3, 520, 620, 519), TailToken(4, 601, 621, 600)]
    tree = TreeRow(Row(0, 0, random_ids(601), 1, GREEDY), tail, num_ranked=2)
    burst = BurstRow(tree, (3, 2), 4)
    assert native(folder).forward_burst(burst) == one_by_one(native(folder), burst)[0]


# What ends one early


@pytest.fixture(name="pipe")
def pipe_fixture() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def burst_of(ids: Sequence[int], num_more: int, **options: object) -> BurstRow:
    """Of own tokens alone, from the beginning."""
    tree = TreeRow(Row(0, 0, ids, 1, options.pop("sampling", GREEDY)), ())  # type: ignore[arg-type]
    return BurstRow(tree, (), num_more, **options)  # type: ignore[arg-type]


def test_no_forward_begins_once_a_descriptor_can_be_read(make: Make, pipe: tuple[int, int]) -> None:
    runner, (reader, writer) = native(make("llama")), pipe
    burst = burst_of([1, 2, 3], 4, descriptors=[reader])
    assert len(runner.forward_burst(burst)) == 5
    os.write(writer, b"!")
    [[(token,)]] = runner.forward_burst(burst)
    assert runner.forward([Row(0, 3, [token], 1, GREEDY)]), "the slot holds the first row alone"


def test_a_descriptor_that_can_be_read_meanwhile_stops_a_burst(
    make: Make, pipe: tuple[int, int]
) -> None:
    runner, (reader, writer) = native(make("llama", max_position_embeddings=8000)), pipe
    ids = [1, 2, 3]
    timer = threading.Timer(0.02, os.write, (writer, b"!"))
    timer.start()
    try:
        drawn = runner.forward_burst(burst_of(ids, 7900, descriptors=[reader]))
    finally:
        timer.join()
    print(f"{len(drawn)} forwards")
    assert len(drawn) < 7901
    text = [*ids, *(ranked[0] for [ranked] in drawn)]
    assert runner.forward([Row(0, len(text) - 1, text[-1:], 1, GREEDY)]) == native(
        make("llama", max_position_embeddings=8000)
    ).forward([Row(0, 0, text, 1, GREEDY)])


def test_where_tokens_are_dropped_first_forwards_are_asked_for_one_by_one(make: Make) -> None:
    folder, sampling = make("llama"), SamplingParams(temperature=0.8, top_p=0.9, seed=3)
    burst = burst_of([1, 2, 3], 4, sampling=sampling)
    assert native(folder).forward_burst(burst) == [native(folder).forward_tree(burst.tree)]


def test_the_forward_whose_logits_are_not_finite_is_not_counted(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_tiny(tmp_path) / "model.safetensors"
    ids = random_ids(4)
    drawn = [ranked[0] for [ranked] in native(tmp_path).forward_burst(burst_of(ids, 3))]
    fine = drawn.index(drawn[2])  # that it is fed for the first time
    assert fine > 0
    assert drawn[fine] not in ids
    weights = load_file(file)
    weights["model.embed_tokens.weight"][drawn[fine]] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    runner = native(tmp_path)
    again = runner.forward_burst(burst_of(ids, 3))
    assert [ranked[0] for [ranked] in again] == drawn[: fine + 1]
    bad = Row(0, len(ids) + fine, [drawn[fine]], 1, GREEDY)
    with pytest.raises(PipeSpecError, match="NaN or infinite"):
        runner.forward_burst(BurstRow(TreeRow(bad, ()), (), 2))


# Where the cache ends


def test_a_burst_may_fill_the_context_and_no_more(make: Make) -> None:
    ids = random_ids(CONTEXT_LENGTH - 3)
    runner = native(make("llama"))
    with pytest.raises(PipeSpecError, match=f"position {CONTEXT_LENGTH} is beyond the context"):
        runner.forward_burst(burst_of(ids, 4))
    with pytest.raises(AssertionError, match="a gap"):
        runner.forward([Row(0, 1, [1], 1, GREEDY)])  # nothing was fed
    burst = burst_of(ids, 3)
    assert runner.forward_burst(burst) == one_by_one(native(make("llama")), burst)[0]


def test_a_branch_may_reach_the_end_of_the_context_in_the_last_rows(make: Make) -> None:
    ids, runner = random_ids(CONTEXT_LENGTH - 4), native(make("llama"))
    last_row = CONTEXT_LENGTH + runner.info.num_tail_rows - 1

    def burst(rounds: tuple[int, int], first_row: int, more: int = 0) -> BurstRow:
        end = len(ids) + more
        tail = [TailToken(3, end, first_row, end - 1), TailToken(4, 3, first_row + 1, 2)]
        return BurstRow(TreeRow(Row(0, 0, ids, 1, GREEDY), tail), rounds, 3)

    fits = burst((3, 1), last_row - 5)
    assert runner.forward_burst(fits) == one_by_one(native(make("llama")), fits)[0]
    with pytest.raises(AssertionError):
        runner.forward_burst(burst((3, 1), last_row - 4))
    with pytest.raises(PipeSpecError, match=f"position {CONTEXT_LENGTH} is beyond the context"):
        runner.forward_burst(burst((3, 1), last_row - 5, more=1))
