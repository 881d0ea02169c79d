"""The native runner's own promise: a token's logits do not depend, to the bit, on what is fed with
it, on where the text was cut, on branches beside it, or on the number of threads.

That its logits are right is tested with the other lean runner's, in test_runners_llama.py. Branches
are tested here for both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from pipespec.config import SamplingParams
from pipespec.errors import PipeSpecError
from pipespec.runners.architecture import UnsupportedCheckpoint
from pipespec.runners.base import BranchingRunner, Row, TailToken, TreeRow
from pipespec.runners.native import NativeRunner
from pipespec.runners.native.build import processor
from pipespec.runners.rows import CHUNK, draw_positions
from pipespec.sampling import rank
from tests.test_runners_llama import (  # noqa: F401
    CONTEXT_LENGTH,
    GREEDY,
    VOCAB_SIZE,
    Loader,
    Make,
    each_lean,
    feed,
    largest,
    make_fixture,
    native,
    random_ids,
)
from tests.tiny import make_tiny, one_thread  # noqa: F401

SHAPES = (
    *("llama", "llama, ungrouped", "llama, one key-value head", "qwen3", "mistral, window"),
    *("qwen2, window in the second layer", "llama, biases"),
)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
SAMPLED = SamplingParams(temperature=0.7, seed=5)


def older_processors() -> list[str]:
    """Those whose code this one runs too: 256-bit vectors, 512-bit, and bfloat16 without AMX."""
    flags = set(processor().split())
    needs = {
        "x86-64-v3": {"avx2", "fma"},
        "x86-64-v4": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
        "cooperlake": {"avx512_bf16", "avx512_vnni", "avx512f", "avx512vl"},
    }
    return [march for march, needed in needs.items() if needed <= flags]


def in_pieces(runner: NativeRunner, ids: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """The logits after every one of `ids`, fed from each of `cuts` to the next."""
    pieces = [feed(runner, ids[a:b], start=a) for a, b in pairwise([*cuts, len(ids)])]
    return torch.cat(pieces)


# The same bits


@DTYPES
@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_bits_do_not_depend_on_the_query_length(
    make: Make, variant: str, dtype: str, num_threads: int
) -> None:
    ids, folder = random_ids(CONTEXT_LENGTH), make(variant)
    at_once = feed(native(folder, dtype=dtype), ids)
    runner = native(folder, dtype=dtype, num_threads=num_threads)
    for query_length in (*range(1, 17), 33):
        cuts = range(0, len(ids), query_length)
        assert torch.equal(in_pieces(runner, ids, cuts), at_once), query_length
    runner.close()


@DTYPES
@pytest.mark.parametrize("march", older_processors())
def test_the_bits_do_not_depend_on_the_query_length_on_an_older_processor(
    make: Make, dtype: str, march: str
) -> None:
    ids, folder = random_ids(CONTEXT_LENGTH), make("llama")
    runner = native(folder, dtype=dtype, march=march)
    at_once = feed(runner, ids)
    assert largest(at_once - feed(native(folder), ids)) < (1e-4 if dtype == "float32" else 0.2)
    for query_length in (*range(1, 17), 33):
        cuts = range(0, len(ids), query_length)
        assert torch.equal(in_pieces(runner, ids, cuts), at_once), query_length


@DTYPES
@pytest.mark.parametrize("variant", ["llama", "mistral, window"])
def test_the_bits_do_not_depend_on_where_a_long_prompt_is_cut(
    make: Make, variant: str, dtype: str
) -> None:
    folder = make(variant, max_position_embeddings=1100)
    ids, runner = random_ids(CHUNK + 300), native(folder, dtype=dtype)
    at_once = feed(runner, ids)
    for cuts in ([0, 1], [0, 300], [0, 37, 38, 41, 100, 700], range(0, len(ids), 7)):
        assert torch.equal(in_pieces(runner, ids, cuts), at_once)
    last = runner.logits(Row(0, 0, ids, 3, GREEDY))  # most rows need no logits
    assert torch.equal(last, at_once[-3:])


@DTYPES
@pytest.mark.parametrize("seed", range(3))
def test_the_bits_survive_rollbacks_and_other_slots(make: Make, dtype: str, seed: int) -> None:
    print(f"seed {seed}")
    choice, folder = random.Random(seed), make("llama")
    runner = native(folder, dtype=dtype, num_slots=2, num_threads=2)
    fresh, held = native(folder, dtype=dtype), {slot: list[int]() for slot in range(2)}
    for _ in range(30):
        slot = choice.randrange(2)
        start = choice.choice([len(held[slot]), choice.randint(0, len(held[slot]))])
        start = min(start, CONTEXT_LENGTH - 1)
        new = random_ids(min(choice.randint(1, 17), CONTEXT_LENGTH - start), choice.randrange(999))
        logits = feed(runner, new, start, slot)
        held[slot] = held[slot][:start] + new
        assert torch.equal(logits, feed(fresh, held[slot])[start:])
    runner.close()


# Branches


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


@DTYPES
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("variant", SHAPES)
def test_a_branch_that_is_kept_leaves_the_same_bits(
    make: Make, variant: str, dtype: str, num_threads: int
) -> None:
    """Step by step two branches grow beside a text; one of them becomes the text."""
    ids, folder = random_ids(40), make(variant)
    runner = native(folder, dtype=dtype, num_threads=num_threads)
    linear = feed(native(folder, dtype=dtype), ids)
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


# What a step returns


def test_the_lowest_of_equally_likely_ids_comes_first(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_tiny(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    runner = native(tmp_path)
    assert runner.forward([Row(0, 0, [1, 2], 2, GREEDY)]) == [[0, 0]]
    row = TreeRow(Row(0, 0, [1], 1, GREEDY), (), num_ranked=4)
    assert runner.forward_tree(row) == [(0, 1, 2, 3)]


@pytest.mark.parametrize("count", [1, 3, VOCAB_SIZE, 2 * VOCAB_SIZE])
def test_ranks_are_those_of_the_logits(make: Make, count: int) -> None:
    ids, runner = random_ids(30), native(make("llama"))
    row = Row(0, 0, ids, len(ids), GREEDY)
    ranked = runner.forward_tree(TreeRow(row, (), num_ranked=count))
    assert ranked == rank(feed(runner, ids), range(1, 31), GREEDY, VOCAB_SIZE, count)


def test_weights_that_give_nan_are_an_error_beside_branches_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_tiny(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][100, 3] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    row = Row(0, 0, [1, 2], 1, GREEDY)
    with pytest.raises(PipeSpecError, match="NaN or infinite"):
        native(tmp_path).forward_tree(TreeRow(row, (), num_ranked=2))


def test_logits_that_were_returned_stay(make: Make) -> None:
    runner = native(make("llama"))
    first = feed(runner, [1, 2, 3])
    copy = first.clone()
    feed(runner, [4, 5, 6])
    assert torch.equal(first, copy)


# What it is, and what it leaves behind


def test_facts_about_it_are_told(make: Make) -> None:
    info = native(make("llama"), dtype="bfloat16").info
    assert (info.runner, info.device, info.dtype) == ("native", "cpu", "bfloat16")
    assert info.weight_bytes >= 2 * info.num_parameters
    assert info.num_tail_rows > 0


@pytest.mark.parametrize(
    ("options", "told"), [({"dtype": "float16"}, "float16"), ({}, "heads of 1024 dimensions")]
)
def test_what_it_does_not_serve_is_left_to_another(
    tmp_path: Path, options: dict[str, str], told: str
) -> None:
    folder = make_tiny(tmp_path, head_dim=16 if options else 1024)
    with pytest.raises(UnsupportedCheckpoint, match=told):
        native(folder, **options)


def test_its_threads_end_when_it_is_closed_or_forgotten(make: Make) -> None:
    process, load = psutil.Process(), partial(native, num_threads=3)
    before = process.num_threads()
    runner = load(make("llama"))
    runner.forward([Row(0, 0, [1, 2, 3], 1, GREEDY)])
    assert process.num_threads() == before + 2
    runner.close()
    assert process.num_threads() == before
    runner = load(make("llama"))
    assert process.num_threads() == before + 2
    del runner
    assert process.num_threads() == before
