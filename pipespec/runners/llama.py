"""The lean runner: Llama, Qwen2, Qwen3 and Mistral checkpoints, without transformers.

Slots of preallocated keys and values around `LlamaModel`. Rollback is a smaller length: what lies
beyond is never read and is overwritten in time. A prompt is fed in chunks, and only the rows that
need logits go through the head, which has no rows for ids that must not be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipespec.runners.architecture import read_architecture
from pipespec.runners.base import Row, RunnerInfo, TreeRow
from pipespec.runners.drawing import draw_rows, rank_tree
from pipespec.runners.llama_model import KeyValues, LlamaModel, Tail
from pipespec.runners.rows import CHUNK, check_row, chunks

TAIL_ROWS = 192  # of each slot, beyond its context, for branches


class _Slot:
    """A cache and how many positions of it hold a prefix. visible: of rows that hold branches, the
    rows that each sees, as bits."""

    __slots__ = ("cache", "length", "visible")

    def __init__(self, cache: KeyValues) -> None:
        self.cache = cache
        self.length = 0
        self.visible: dict[int, int] = {}

    def sees(self, row: int) -> int:
        """The rows that what is stored in `row` sees: a row of the text, all up to itself."""
        return (1 << (row + 1)) - 1 if row < self.length else self.visible[row]


class LlamaRunner:
    """Loads the checkpoint in `folder` onto one device.

    name: for messages. dtype: "float32", "bfloat16" or "float16", honoured exactly. device: "cpu"
    or "cuda:N". vocab_size: how many ids the tokenizer knows; ids from there on are never drawn.
    context_length: positions of a slot, None for the checkpoint's; at most that. num_slots:
    requests held at a time, whose memory is taken now. num_threads: of torch, in forwards.

    Raises:
        UnsupportedCheckpoint: another runner is needed.
        ModelLoadError: a file that is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        dtype: str,
        device: str,
        vocab_size: int,
        context_length: int | None = None,
        num_slots: int = 1,
        num_threads: int = 1,
    ) -> None:
        arch = read_architecture(folder)
        length = min(context_length or arch.context_length, arch.context_length)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        vocab_size = min(vocab_size, arch.vocab_size)
        with torch.inference_mode():
            model = LlamaModel(
                folder,
                arch,
                dtype=torch_dtype,
                device=torch.device(device),
                vocab_size=vocab_size,
                context_length=length,
                num_extra_rows=TAIL_ROWS,
                num_threads=num_threads,
            )
            self._free = [_Slot(model.new_cache()) for _ in range(num_slots)]
        self._model: LlamaModel | None = model
        self._slots: dict[int, _Slot] = {}
        self._num_embeddings = arch.vocab_size
        num_tail_rows = 0 if any(arch.windows) else TAIL_ROWS
        self._info = RunnerInfo(
            name=name,
            runner="llama",
            device=device,
            dtype=dtype,
            vocab_size=vocab_size,
            context_length=length,
            num_parameters=model.num_parameters,
            weight_bytes=model.weight_bytes,
            num_tail_rows=num_tail_rows,
            attention=f"sdpa {str(model.cache_dtype).removeprefix('torch.')}",
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """See `draw_rows`."""
        return draw_rows(rows, self._info, self._num_embeddings, self._row_logits)

    @torch.inference_mode()
    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        """See `ModelRunner`.

        Raises:
            PipeSpecError: as `forward`.
        """
        return rank_tree(row, self._info, self._num_embeddings, self._tree_logits)

    @torch.inference_mode()
    def logits(self, row: Row) -> Tensor:
        """Feeds the row and returns what its draws would be made of: [num_draws, vocab_size]
        float32, on the device."""
        check_row(row, self._info, self._num_embeddings)
        return self._row_logits(row).float()

    def release(self, slot: int) -> None:
        freed = self._slots.pop(slot, None)
        if freed is not None:
            freed.length = 0
            self._free.append(freed)

    def close(self) -> None:
        if self._model is None:
            return
        on_gpu = self._model.device.type == "cuda"
        self._model = None
        self._slots.clear()
        self._free.clear()
        if on_gpu:
            torch.cuda.empty_cache()

    def _slot(self, number: int) -> _Slot:
        slot = self._slots.get(number)
        if slot is None:
            assert self._free, "more live slots than the runner was loaded for"
            slot = self._slots[number] = self._free.pop()
        return slot

    def _tree_logits(self, tree: TreeRow) -> Tensor:
        """Forwards a checked tree. Returns [num_draws + len(tail), vocab_size]."""
        model, row, slot = self._model, tree.row, self._slot(tree.row.slot)
        assert model is not None, "the runner is closed"
        if tree.keep:
            slot.cache.keep(tree.keep_start, tree.keep)
            slot.length = max(slot.length, tree.keep_start + len(tree.keep))
        assert row.start <= slot.length, "a gap between what the slot holds and the row"
        if not tree.tail:
            return self._row_logits(row)
        slot.length = row.start + len(row.ids)
        slot.visible = {at: bits for at, bits in slot.visible.items() if at >= slot.length}
        for item in tree.tail:
            slot.visible[item.row] = slot.sees(item.parent_row) | 1 << item.row
        own = [slot.sees(position) for position in range(row.start, slot.length)]
        tail = Tail(
            tree.tail[0].row,
            [item.position for item in tree.tail],
            [*own, *(slot.visible[item.row] for item in tree.tail)],
        )
        ids = [*row.ids, *(item.token for item in tree.tail)]
        hidden = model.forward(ids, row.start, slot.cache, tail)
        return model.logits(hidden[len(row.ids) - row.num_draws :])

    def _row_logits(self, row: Row) -> Tensor:
        """Forwards one checked row. Returns [num_draws, vocab_size] in the model's dtype."""
        model, slot = self._model, self._slot(row.slot)
        assert model is not None, "the runner is closed"
        assert row.start <= slot.length, "a gap between what the slot holds and the row"
        slot.length = row.start
        end = row.start + len(row.ids)
        if len(row.ids) <= CHUNK:
            hidden = model.forward(row.ids, row.start, slot.cache)
            slot.length = end
            return model.logits(hidden[-row.num_draws :])
        wanted: list[Tensor] = []
        for start, stop in chunks(row.start, len(row.ids)):
            ids = row.ids[start - row.start : stop - row.start]
            hidden = model.forward(ids, start, slot.cache)
            slot.length = stop
            if stop > end - row.num_draws:
                wanted.append(hidden[max(0, end - row.num_draws - start) :])
        return model.logits(torch.cat(wanted))
