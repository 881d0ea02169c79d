"""The native runner's own promise: a token's logits do not depend, to the bit, on what is fed with
it, on where the text was cut, on branches beside it, or on the number of threads.

That its logits are right is tested with the other lean runner's, in test_runners_llama.py, and what
concerns branches for both in test_runners_branches.py.
"""

from __future__ import annotations

import random
import subprocess
import sys
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
from pipespec.runners.base import Row, TreeRow
from pipespec.runners.native import NativeRunner
from pipespec.runners.native.build import processor
from pipespec.runners.rows import CHUNK, draw_positions
from pipespec.sampling import draw, rank
from tests.test_runners_llama import (  # noqa: F401
    CONTEXT_LENGTH,
    GREEDY,
    VOCAB_SIZE,
    Loader,
    Make,
    feed,
    largest,
    lean,
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


def older_processors() -> list[str]:
    """Those whose code this one runs too: 128-bit vectors, 256-bit without and with fused sums,
    512-bit, and bfloat16 without AMX."""
    flags = set(processor().split())
    needs = {
        "x86-64": {"sse2"},
        "sandybridge": {"avx"},
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
@pytest.mark.parametrize("variant", ["llama", "llama, biases", "mistral, window"])
@pytest.mark.parametrize("march", older_processors())
def test_the_bits_do_not_depend_on_the_query_length_on_an_older_processor(
    make: Make, variant: str, dtype: str, march: str
) -> None:
    ids, folder = random_ids(CONTEXT_LENGTH), make(variant)
    runner = native(folder, dtype=dtype, march=march, num_threads=2)
    at_once = feed(runner, ids)
    assert largest(at_once - feed(native(folder), ids)) < (1e-4 if dtype == "float32" else 0.2)
    for query_length in (*range(1, 17), 33):
        cuts = range(0, len(ids), query_length)
        assert torch.equal(in_pieces(runner, ids, cuts), at_once), query_length
    runner.close()


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
    for count in (1, 3, 16, 17, 31, 33, 48, 600):  # the other rows need no logits
        assert torch.equal(runner.logits(Row(0, 0, ids, count, GREEDY)), at_once[-count:])


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


@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.7])
def test_draws_with_noise_are_those_of_sampling(make: Make, temperature: float) -> None:
    runner = NativeRunner(make("llama"), name="m", dtype="float32", vocab_size=99)
    for number in range(40):
        choice = random.Random(number)
        ids = [choice.randrange(99) for _ in range(choice.randint(8, 30))]
        sampling = SamplingParams(temperature=temperature, seed=choice.getrandbits(63))
        row = Row(0, 0, ids, choice.randint(1, 8), sampling)
        logits, count = runner.logits(row), choice.randint(2, 99)
        positions = draw_positions(row)
        assert runner.forward([row]) == [draw(logits, positions, sampling, 99)], number
        ranked = rank(logits, positions, sampling, 99, count)
        assert runner.forward_tree(TreeRow(row, (), num_ranked=count)) == ranked, number


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
    assert info.num_tail_rows >= lean(make("llama")).info.num_tail_rows


@pytest.mark.parametrize(
    ("options", "told"), [({"dtype": "float16"}, "float16"), ({}, "heads of 1024 dimensions")]
)
def test_what_it_does_not_serve_is_left_to_another(
    tmp_path: Path, options: dict[str, str], told: str
) -> None:
    folder = make_tiny(tmp_path, head_dim=16 if options else 1024)
    with pytest.raises(UnsupportedCheckpoint, match=told):
        native(folder, **options)


@pytest.mark.parametrize("variant", ["llama", "mistral, window"])
def test_a_very_long_text_is_served(make: Make, variant: str) -> None:
    folder, ids = make(variant, max_position_embeddings=6000), random_ids(6000)
    last = Row(0, 0, ids, 40, GREEDY)
    reference, runner = lean(folder).logits(last), native(folder)
    assert largest(runner.logits(last) - reference) < 1e-3
    one_by_one = [feed(runner, ids[at : at + 1], start=at) for at in range(5960, 6000)]
    assert torch.equal(torch.cat(one_by_one), runner.logits(last))


def test_what_the_caller_does_with_tiny_numbers_does_not_show(tmp_path: Path) -> None:
    """Torch may take them for zero, thread by thread; logits of this model are as tiny."""
    from safetensors.torch import load_file, save_file

    file = make_tiny(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= 1e-38
    save_file(weights, file, metadata={"format": "pt"})
    ids, all_logits = random_ids(20), []
    for flushes in (False, True):
        for num_threads in (1, 2):
            runner = native(tmp_path, num_threads=num_threads)
            torch.set_flush_denormal(flushes)
            try:
                all_logits.append(feed(runner, ids).view(torch.int32))
            finally:
                torch.set_flush_denormal(False)
                runner.close()
    assert all(torch.equal(logits, all_logits[0]) for logits in all_logits)


def test_a_fork_ends_although_the_threads_are_not_its_own(make: Make) -> None:
    code = f"""
import os, signal
from pathlib import Path
from pipespec.config import SamplingParams
from pipespec.runners.base import Row
from pipespec.runners.native import NativeRunner
folder = Path({str(make("llama"))!r})
runner = NativeRunner(folder, name="tiny", dtype="float32", vocab_size=128, num_threads=2)
row = Row(0, 0, [1, 2], 2, SamplingParams())
draws = runner.forward([row])
child = os.fork()
if child == 0:
    signal.alarm(20)
    try:
        runner.forward([row])
    except AssertionError as error:
        print(error)
else:
    _, status = os.waitpid(child, 0)
    assert runner.forward([row]) == draws
    print(status)
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.splitlines() == ["a fork has none of the runner's threads", "0"], run.stderr


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
