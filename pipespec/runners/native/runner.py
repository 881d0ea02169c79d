"""The native runner: Llama, Qwen2, Qwen3 and Mistral checkpoints on CPU, a forward in one C++ call.

Slots of preallocated keys and values around `step.cpp`. Rollback is a smaller length. What a token
gets does not depend on the number of tokens fed with it, on where a prompt was cut, on branches
beside it or on the number of threads: it is the same to the bit, in bfloat16 too.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import c_int32
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from pipespec.errors import PipeSpecError
from pipespec.runners.architecture import Architecture, UnsupportedCheckpoint, read_architecture
from pipespec.runners.base import Row, RunnerInfo, TailToken, TreeRow
from pipespec.runners.drawing import draw_rows, rank_tree
from pipespec.runners.llama_model import rotations
from pipespec.runners.native import library
from pipespec.runners.native.build import load_library
from pipespec.runners.native.packing import PANEL, Weights, load_weights, padded
from pipespec.runners.rows import check_row, check_tree, chunks

TAIL_ROWS: Final = 192  # of each slot, beyond its context, for branches
_MAX_HEAD_DIM: Final = 512  # step.cpp
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Slot:
    """A cache and how many positions of it hold a prefix. branches: for rows that hold branches,
    how many rows of the text each sees, and then which rows, itself last."""

    __slots__ = ("branches", "cache", "length")

    def __init__(self, cache: Tensor) -> None:
        self.cache = cache
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
        self._rotation = (rotation.real.contiguous(), rotation.imag.contiguous())
        self._weights = load_weights(folder, arch, _DTYPES[dtype], vocab_size)
        self._num_embeddings = arch.vocab_size
        self._logits = torch.empty(0, self._weights.head.num_panels * PANEL)
        self._ranked = (c_int32 * 0)()
        self._feed = library.Feed()
        self._model = self._create(arch, num_cache_rows, vocab_size, num_threads)
        self._destroy = weakref.finalize(self, self._library.pipespec_destroy, self._model)
        kernel = self._library.pipespec_kernel(self._model).decode()
        self._info = RunnerInfo(
            name=name,
            runner="native",
            device="cpu",
            dtype=dtype,
            vocab_size=vocab_size,
            context_length=length,
            num_parameters=self._weights.num_parameters,
            weight_bytes=self._weights.weight_bytes,
            num_tail_rows=TAIL_ROWS,
            attention=f"native float32, {kernel} products",
        )

    def _create(
        self, arch: Architecture, num_cache_rows: int, vocab_size: int, num_threads: int
    ) -> int | None:
        weights: Weights = self._weights
        cosines, sines = self._rotation
        shape = library.Shape(
            hidden=arch.hidden_size,
            inner=arch.intermediate_size,
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            vocab_size=vocab_size,
            num_cache_rows=num_cache_rows,
            num_threads=num_threads,
            is_bfloat16=weights.embedding.dtype == torch.bfloat16,
            norm_eps=arch.norm_eps,
            embedding=weights.embedding.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=weights.head,
            layers=weights.layers,
        )
        model: int | None = self._library.pipespec_create(ctypes.byref(shape))
        if model is None:
            raise MemoryError("no memory or no thread left for the native runner")
        return model

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """See `draw_rows`; at temperature 0 the tokens are chosen in C++."""
        if any(row.sampling.temperature > 0.0 for row in rows):
            return draw_rows(rows, self._info, self._num_embeddings, self._row_logits)
        for row in rows:
            check_row(row, self._info, self._num_embeddings)
        draws: list[list[int]] = []
        for row in rows:
            if self._run(row, (), 1):
                draws.append(self._ranked[: row.num_draws])
            else:  # logits that are not finite; say so
                draws += draw_rows([row], self._info, self._num_embeddings, self._row_logits)
        return draws

    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        """See `BranchingRunner`.

        Raises:
            PipeSpecError: as `forward`.
        """
        count = min(row.num_ranked, self._info.vocab_size)
        if row.row.sampling.temperature == 0.0:
            check_tree(row, self._info, self._num_embeddings)
            if self._run_tree(row, count):
                flat = self._ranked[: count * (row.row.num_draws + len(row.tail))]
                return [tuple(flat[at : at + count]) for at in range(0, len(flat), count)]
        return rank_tree(row, self._info, self._num_embeddings, self._tree_logits)

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
        return self._logits[: row.num_draws, : self._info.vocab_size]

    def _tree_logits(self, tree: TreeRow) -> Tensor:
        """Feeds a checked tree. Returns [num_draws + len(tail), vocab_size], as `_row_logits`."""
        self._run_tree(tree, 0)
        return self._logits[: tree.row.num_draws + len(tree.tail), : self._info.vocab_size]

    def _run_tree(self, tree: TreeRow, num_ranked: int) -> bool:
        """As `_run`, for a checked tree."""
        assert self._model is not None, "the runner is closed"
        row, slot = tree.row, self._slot(tree.row.slot)
        if tree.keep:
            rows = (c_int32 * len(tree.keep))(*tree.keep)
            cache = slot.cache.data_ptr()
            self._library.pipespec_keep(self._model, cache, tree.keep_start, rows, len(rows))
            slot.length = max(slot.length, tree.keep_start + len(tree.keep))
        return self._run(row, tree.tail, num_ranked)

    def _run(self, row: Row, tail: Sequence[TailToken], num_ranked: int) -> bool:
        """Feeds a row, chunk by chunk, and with the last chunk its tail. Leaves the logits of its
        draws and of the tail in `_logits`, and of each the `num_ranked` largest in `_ranked`.

        Returns:
            False if some were to be ranked and are not finite.
        """
        assert self._model is not None, "the runner is closed"
        slot, end = self._slot(row.slot), row.start + len(row.ids)
        assert row.start <= slot.length, "a gap between what the slot holds and the row"
        self._reserve(row.num_draws + len(tail), num_ranked)
        feed, num_done, is_finite = self._feed, 0, True
        feed.cache, feed.num_ranked = slot.cache.data_ptr(), num_ranked
        for start, stop in chunks(row.start, len(row.ids)):
            ids = row.ids[start - row.start : stop - row.start]
            slot.length = stop
            num_outputs = max(0, stop - max(start, end - row.num_draws))
            branches = tail if stop == end else ()
            if branches:
                ids = [*ids, *(item.token for item in branches)]
                table, chain = _tail_tables(slot, branches)
                feed.tail, feed.chain = ctypes.addressof(table), ctypes.addressof(chain)
            id_table = (c_int32 * len(ids))(*ids)
            feed.ids = ctypes.addressof(id_table)
            feed.start, feed.num_own, feed.num_tail = start, stop - start, len(branches)
            feed.num_outputs = num_outputs + len(branches)
            feed.logits = self._logits.data_ptr() + 4 * num_done * self._logits.shape[1]
            feed.ranked = ctypes.addressof(self._ranked) + 4 * num_done * num_ranked
            status = self._library.pipespec_forward(self._model, ctypes.byref(feed))
            if status == library.NO_MEMORY:
                raise PipeSpecError(
                    f"{self._info.name} ran out of memory during a forward; shorten the prompt or "
                    "use a smaller model"
                )
            is_finite = is_finite and status == library.OK
            num_done += feed.num_outputs
        return is_finite

    def _reserve(self, num_outputs: int, num_ranked: int) -> None:
        """Makes room for what a forward returns."""
        if num_outputs > len(self._logits):
            self._logits = torch.empty(num_outputs, self._logits.shape[1])
        if num_outputs * num_ranked > len(self._ranked):
            self._ranked = (c_int32 * (num_outputs * num_ranked))()


def _tail_tables(
    slot: _Slot, tail: Sequence[TailToken]
) -> tuple[ctypes.Array[c_int32], ctypes.Array[c_int32]]:
    """What `Feed` calls tail and chain; the slot gets to know the branches."""
    slot.branches = {row: seen for row, seen in slot.branches.items() if row >= slot.length}
    fields: list[int] = []
    chains: list[int] = []
    for item in tail:
        prefix, rows = slot.sees(item.parent_row)
        rows = [*rows, item.row]
        slot.branches[item.row] = (prefix, rows)
        fields += (item.position, item.row, prefix, len(chains))
        chains += rows
    fields += (0, 0, 0, len(chains))
    return (c_int32 * len(fields))(*fields), (c_int32 * len(chains))(*chains)
