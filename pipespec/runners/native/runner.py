"""The native runner: Llama, Qwen2, Qwen3 and Mistral checkpoints on CPU, a forward in one C++ call.

Slots of preallocated keys and values around `step.cpp`. Rollback is a smaller length. What a token
gets does not depend on the number of tokens fed with it, on where a prompt was cut, on branches
beside it or on the number of threads: it is the same to the bit, in bfloat16 too.

A step's time with one thread of a Xeon with AMX (2 MiB of second cache a core) after 256 tokens, by
the number of tokens fed, this runner / the llama runner in the same run; beside it the time that
one core takes to read as many bytes as the weights have. us to 2M, then ms:

    parameters         read    1 token    4 tokens     8 tokens   16 tokens
    1.0M  float32       135    166/361     173/462      188/517     302/626
    1.0M  bfloat16       29     79/424      82/458      100/489     142/555
    1.9M  float32       270    330/602     352/727      417/833    659/1049
    1.9M  bfloat16      130    205/744     222/805      249/864     327/969
    12M   float32       1.7    1.9/3.4     2.0/4.8      2.2/5.6     3.8/7.0
    12M   bfloat16      0.8    1.1/2.7     1.2/3.0      1.3/3.2     1.6/3.5
    27M   float32       7.8    6.6/9.7    7.5/13.9     9.5/15.9   13.1/19.2
    27M   bfloat16      1.9    2.5/6.5     2.6/7.0      2.8/7.4     3.3/8.1
    124M  float32        31      31/40       33/48        43/55       57/68
    124M  bfloat16       16      18/26       19/28        20/29       21/32
    481M  float32       133    110/146     114/156      156/184     211/241
    481M  bfloat16       63      70/89       72/92        76/96      80/102

Branches cost what as many tokens of a text cost (1.0M, float32, 16: 359 us beside 325). A prompt of
300 and 900 tokens takes 41 and 137 ms for the 12M (59 and 189), 343 and 1078 ms for the 124M (405
and 1251), in bfloat16 13 and 54 (23 and 90), 88 and 333 (111 and 460). Huge pages gain nothing.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import c_int32
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from pipespec.config import SamplingParams
from pipespec.errors import PipeSpecError
from pipespec.runners.architecture import Architecture, UnsupportedCheckpoint, read_architecture
from pipespec.runners.base import TAIL_ROWS, BurstRow, Row, RunnerInfo, TailToken, TreeRow
from pipespec.runners.drawing import draw_rows, rank_tree
from pipespec.runners.llama_weights import rotations
from pipespec.runners.native import library
from pipespec.runners.native.build import load_library
from pipespec.runners.native.packing import PANEL, Weights, load_weights, padded
from pipespec.runners.rows import check_burst, check_row, check_tree, chunks
from pipespec.sampling import keeps_all

_MAX_HEAD_DIM: Final = 512  # step.cpp
_MAX_RANKED: Final = 64  # noise.h
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Slot:
    """A cache and how many positions of it hold a prefix. branches: for rows that hold branches,
    how many rows of the text each sees, and then which rows, itself last."""

    __slots__ = ("address", "branches", "cache", "length")

    def __init__(self, cache: Tensor) -> None:
        self.cache = cache
        self.address = cache.data_ptr()
        self.length = 0
        self.branches: dict[int, tuple[int, list[int]]] = {}

    def sees(self, row: int) -> tuple[int, list[int]]:
        return (row + 1, []) if row < self.length else self.branches[row]


class NativeRunner:
    """Loads the checkpoint in `folder` into memory, packed for the step's products.

    name: for messages. dtype: "float32" or "bfloat16", of the weights. vocab_size: how many ids the
    tokenizer knows; ids from there on are never drawn. context_length: positions of a slot, None
    for the checkpoint's; at most that. num_slots: requests held at a time, whose memory is taken
    now. num_threads: that share a forward. compiler, march: as of `load_library`.

    Raises:
        UnsupportedCheckpoint: another runner is needed.
        BuildError: the C++ cannot be compiled.
        ModelLoadError: a file that is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        dtype: str,
        vocab_size: int,
        context_length: int | None = None,
        num_slots: int = 1,
        num_threads: int = 1,
        compiler: str | None = None,
        march: str = "native",
    ) -> None:
        arch = read_architecture(folder)
        if dtype not in _DTYPES or arch.head_dim > _MAX_HEAD_DIM:
            what = dtype if dtype not in _DTYPES else f"heads of {arch.head_dim} dimensions"
            raise UnsupportedCheckpoint(f"{folder}: {what}: not served by the native runner")
        self._library = library.declare(load_library(compiler, march))
        length = min(context_length or arch.context_length, arch.context_length)
        vocab_size = min(vocab_size, arch.vocab_size)
        num_cache_rows = padded(length + TAIL_ROWS)
        size = arch.num_layers * arch.num_kv_heads * num_cache_rows
        size *= arch.head_dim + padded(arch.head_dim)
        self._free = [_Slot(torch.zeros(size)) for _ in range(num_slots)]
        self._slots: dict[int, _Slot] = {}
        rotation = rotations(arch.rope, arch.head_dim, length, torch.device("cpu")).squeeze(1)
        weights = load_weights(folder, arch, _DTYPES[dtype], vocab_size)
        self._num_embeddings = arch.vocab_size
        self._feed = library.Feed()
        self._logit_stride = weights.head.num_panels * PANEL
        self._num_logits, self._ranked = 0, (c_int32 * 0)()
        self._tables: tuple[object, ...] = ()
        self._make_room(1, 1)
        cosines, sines = rotation.real.contiguous(), rotation.imag.contiguous()
        self._read_in_forwards = [*weights.tensors, cosines, sines]  # the model has addresses only
        shape = _shape(arch, weights, cosines, sines)
        shape.vocab_size, shape.num_cache_rows = vocab_size, num_cache_rows
        shape.num_threads, shape.is_bfloat16 = num_threads, dtype == "bfloat16"
        self._model: int | None = self._library.pipespec_create(ctypes.byref(shape))
        if self._model is None:
            raise MemoryError("no memory or no thread left for the native runner")
        self._process_id = os.getpid()
        self._destroy = weakref.finalize(
            self, _destroy, self._library, self._model, self._process_id
        )
        kernel = self._library.pipespec_kernel(self._model).decode()
        self._info = RunnerInfo(
            name=name,
            runner="native",
            device="cpu",
            dtype=dtype,
            vocab_size=vocab_size,
            context_length=length,
            num_parameters=weights.num_parameters,
            weight_bytes=weights.weight_bytes,
            num_tail_rows=TAIL_ROWS,
            has_bursts=True,
            attention=f"native float32, {kernel} products",
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """See `draw_rows`; the tokens are chosen in C++ unless some are to be dropped first."""
        if not all(_is_drawn_here(row.sampling) for row in rows):
            return draw_rows(rows, self._info, self._num_embeddings, self._row_logits)
        for row in rows:
            check_row(row, self._info, self._num_embeddings)
        draws: list[list[int]] = []
        for row in rows:
            if self._run(row, (), 1):
                draws.append(self._ranked[: row.num_draws])
            else:  # logits that are not finite: is there a largest, or is it an error?
                draws += draw_rows([row], self._info, self._num_embeddings, self._last_logits)
        return draws

    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        """See `BranchingRunner`.

        Raises:
            PipeSpecError: as `forward`.
        """
        if not _is_drawn_here(row.row.sampling) or row.num_ranked > _MAX_RANKED:
            return rank_tree(row, self._info, self._num_embeddings, self._tree_logits)
        check_tree(row, self._info, self._num_embeddings)
        count = min(row.num_ranked, self._info.vocab_size)
        if not self._run_tree(row, count):
            return rank_tree(row, self._info, self._num_embeddings, self._last_tree_logits)
        flat = self._ranked[: count * (row.row.num_draws + len(row.tail))]
        return [tuple(flat[at : at + count]) for at in range(0, len(flat), count)]

    def forward_burst(self, burst: BurstRow) -> list[list[tuple[int, ...]]]:
        """See `BurstRunner`; one forward where tokens are not chosen in C++.

        Raises:
            PipeSpecError: as `forward`.
        """
        tree = burst.tree
        if not _is_drawn_here(tree.row.sampling) or tree.num_ranked > _MAX_RANKED:
            return [self.forward_tree(tree)]
        check_burst(burst, self._info, self._num_embeddings)
        count, num_outputs = min(tree.num_ranked, self._info.vocab_size), len(tree.tail) + 1
        self._make_room(num_outputs, count * (1 + burst.num_more))
        if not self._run_tree(tree, count):
            return [rank_tree(tree, self._info, self._num_embeddings, self._last_tree_logits)]
        num_done = self._draw_on(burst) if burst.num_more else 0
        has_own, start, draws = bool(tree.row.ids), 0, []
        for done in range(num_done + 1):
            stop = start + count * (has_own + sum(rounds >= done for rounds in burst.rounds))
            flat = self._ranked[start:stop]
            draws.append([tuple(flat[at : at + count]) for at in range(0, len(flat), count)])
            start = stop
        return draws

    def logits(self, row: Row) -> Tensor:
        """Feeds the row and returns what its draws would be made of: [num_draws, vocab_size]
        float32."""
        check_row(row, self._info, self._num_embeddings)
        return self._row_logits(row).clone()

    def release(self, slot: int) -> None:
        freed = self._slots.pop(slot, None)
        if freed is not None:
            freed.length = 0
            freed.branches.clear()
            self._free.append(freed)

    def close(self) -> None:
        self._model = None
        self._destroy()
        self._read_in_forwards.clear()
        self._slots.clear()
        self._free.clear()

    def _slot(self, number: int) -> _Slot:
        slot = self._slots.get(number)
        if slot is None:
            assert self._free, "more live slots than the runner was loaded for"
            slot = self._slots[number] = self._free.pop()
        return slot

    def _row_logits(self, row: Row) -> Tensor:
        """Feeds a checked row. Returns [num_draws, vocab_size], valid until the next forward."""
        self._run(row, (), 0)
        return self._last_logits(row)

    def _last_logits(self, row: Row) -> Tensor:
        """As `_row_logits`, for the row that was fed last."""
        return self._logits[: row.num_draws, : self._info.vocab_size]

    def _tree_logits(self, tree: TreeRow) -> Tensor:
        """Feeds a checked tree. Returns [num_draws + len(tail), vocab_size], as `_row_logits`."""
        self._run_tree(tree, 0)
        return self._last_tree_logits(tree)

    def _last_tree_logits(self, tree: TreeRow) -> Tensor:
        return self._logits[: tree.row.num_draws + len(tree.tail), : self._info.vocab_size]

    def _run_tree(self, tree: TreeRow, num_ranked: int) -> bool:
        """As `_run`, for a checked tree."""
        assert self._model is not None, "the runner is closed"
        row, slot = tree.row, self._slot(tree.row.slot)
        if tree.keep:
            assert tree.keep_start <= slot.length, "a gap between what the slot holds and is kept"
            assert slot.branches.keys() >= set(tree.keep), "a row is kept that holds nothing"
            rows = (c_int32 * len(tree.keep))(*tree.keep)
            start, count = tree.keep_start, len(tree.keep)
            self._library.pipespec_keep(self._model, slot.address, start, rows, count)
            slot.length = max(slot.length, start + count)
        return self._run(row, tree.tail, num_ranked)

    def _run(self, row: Row, tail: Sequence[TailToken], num_ranked: int) -> bool:
        """Feeds a row, chunk by chunk, and with the last chunk its tail. Leaves the logits of its
        draws and of the tail in `_logits`, and of each the `num_ranked` largest in `_ranked`.

        Returns:
            False if some were to be ranked and are not finite.
        """
        assert self._model is not None, "the runner is closed"
        assert self._process_id == os.getpid(), "a fork has none of the runner's threads"
        slot, end = self._slot(row.slot), row.start + len(row.ids)
        assert row.start <= slot.length, "a gap between what the slot holds and the row"
        num_outputs = row.num_draws + len(tail)
        self._make_room(num_outputs, num_ranked)
        feed, num_done, is_finite = self._feed, 0, True
        feed.cache, feed.num_ranked = slot.address, num_ranked
        feed.temperature, feed.seed = row.sampling.temperature, row.sampling.seed
        for start, stop in chunks(row.start, len(row.ids)):
            ids = row.ids[start - row.start : stop - row.start]
            slot.length = stop
            branches = tail if stop == end else ()
            if branches:
                ids = [*ids, *(item.token for item in branches)]
                table, chain = self._tables = _tail_tables(slot, branches)
                feed.tail, feed.chain = ctypes.addressof(table), ctypes.addressof(chain)
            id_table = (c_int32 * len(ids))(*ids)
            feed.ids = ctypes.addressof(id_table)
            feed.start, feed.num_own, feed.num_tail = start, stop - start, len(branches)
            feed.num_outputs = max(0, stop - max(start, end - row.num_draws)) + len(branches)
            feed.logits = self._logits_address + 4 * num_done * self._logit_stride
            feed.ranked = self._ranked_address + 4 * num_done * num_ranked
            status = self._library.pipespec_forward(self._model, ctypes.byref(feed))
            if status == library.NO_MEMORY:
                slot.length = start
                raise self._no_memory()
            is_finite = is_finite and status == library.OK
            num_done += feed.num_outputs
        return is_finite

    def _draw_on(self, burst: BurstRow) -> int:
        """Forwards that follow the one that was done last, over the burst's tree; how many."""
        tree, slot = burst.tree, self._slot(burst.tree.row.slot)
        rounds = (c_int32 * len(burst.rounds))(*burst.rounds)
        descriptors = (c_int32 * len(burst.descriptors))(*burst.descriptors)
        more = library.Burst(
            ctypes.addressof(rounds), ctypes.addressof(descriptors),
            burst.num_more, len(burst.descriptors),
        )  # fmt: skip
        num_done: int = self._library.pipespec_draw_on(
            self._model, ctypes.byref(self._feed), ctypes.byref(more)
        )
        if num_done < 0:
            raise self._no_memory()
        slot.length += num_done if tree.row.ids else 0
        ends = [item.row for item in tree.tail]  # of the branches
        for done in range(num_done):
            row = ends[-1] if ends else 0
            ends = ends[: sum(rounds > done for rounds in burst.rounds)]
            for index, end in enumerate(ends):
                row += 1
                prefix, rows = slot.branches[end]
                slot.branches[row] = prefix, [*rows, row]
                ends[index] = row
        return num_done

    def _no_memory(self) -> PipeSpecError:
        return PipeSpecError(
            f"{self._info.name} ran out of memory during a forward; shorten the prompt or use a "
            "smaller model"
        )

    def _make_room(self, num_outputs: int, num_ranked: int) -> None:
        """For what a forward returns, if there is not enough."""
        if num_outputs > self._num_logits:
            self._num_logits = num_outputs
            self._logits = torch.empty(num_outputs, self._logit_stride)
            self._logits_address = self._logits.data_ptr()
        if num_outputs * num_ranked > len(self._ranked):
            self._ranked = (c_int32 * (num_outputs * num_ranked))()
            self._ranked_address = ctypes.addressof(self._ranked)


def _is_drawn_here(sampling: SamplingParams) -> bool:
    """Whether step.cpp can choose the tokens."""
    return sampling.temperature == 0.0 or keeps_all(sampling)


def _shape(arch: Architecture, weights: Weights, cosines: Tensor, sines: Tensor) -> library.Shape:
    """What the model is; how it is run is left open."""
    return library.Shape(
        hidden=arch.hidden_size,
        inner=arch.intermediate_size,
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        norm_eps=arch.norm_eps,
        embedding=weights.embedding.data_ptr(),
        cosines=cosines.data_ptr(),
        sines=sines.data_ptr(),
        norm=weights.norm.data_ptr(),
        head=weights.head,
        layers=weights.layers,
    )


def _destroy(model_library: ctypes.CDLL, model: int, process_id: int) -> None:
    """Frees a model and ends its threads; in a fork of its process there is none to end."""
    if os.getpid() == process_id:
        model_library.pipespec_destroy(model)


def _tail_tables(
    slot: _Slot, tail: Sequence[TailToken]
) -> tuple[ctypes.Array[c_int32], ctypes.Array[c_int32]]:
    """What `Feed` calls tail and chain; the slot gets to know the branches."""
    slot.branches = {row: seen for row, seen in slot.branches.items() if row >= slot.length}
    fields: list[int] = []
    chains: list[int] = []
    for item in tail:
        assert item.parent_row < item.row, "rows of a branch ascend"
        prefix, rows = slot.sees(item.parent_row)
        rows = [*rows, item.row]
        slot.branches[item.row] = (prefix, rows)
        fields += (item.position, item.row, prefix, len(chains))
        chains += rows
    fields += (0, 0, 0, len(chains))
    return (c_int32 * len(fields))(*fields), (c_int32 * len(chains))(*chains)
