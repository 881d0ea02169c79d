"""The lean runner: Llama, Qwen2, Qwen3 and Mistral checkpoints, without transformers.

Slots of preallocated keys and values around `LlamaModel`. Rollback is a smaller length: what lies
beyond is never read and is overwritten in time. A prompt is fed in chunks, and only the rows that
need logits go through the head, which has no rows for ids that must not be drawn. On a GPU short
steps are captured graphs; so that the bits of a step never vary, they can have one shape (both:
`graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipespec.runners.architecture import read_architecture
from pipespec.runners.base import TAIL_ROWS, Row, RunnerInfo, TreeRow
from pipespec.runners.capture import Capture, Recorder
from pipespec.runners.drawing import draw_rows, rank_tree
from pipespec.runners.graphs import FIXED_ROWS, StaticSteps
from pipespec.runners.llama_model import KeyValues, LlamaModel, Tail
from pipespec.runners.meanwhile import Meanwhile
from pipespec.runners.rows import CHUNK, check_row, chunks
from pipespec.runners.tree_steps import TreeSteps, TreeTokens

_ROW_GRID = 64  # a cache has a multiple of so many rows: GPU kernels want aligned masks
_FIXED_GRID = 512  # and of so many where bits count: attention on CPU goes by blocks of this size


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
    deterministic: draws come from steps of one shape, whatever is asked for at a time; branches,
    whose steps are of any shape, are not served then. use_graphs: on a GPU.

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
        deterministic: bool = False,
        use_graphs: bool = True,
    ) -> None:
        arch = read_architecture(folder)
        length = min(context_length or arch.context_length, arch.context_length)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        vocab_size = min(vocab_size, arch.vocab_size)
        num_tail_rows = 0 if deterministic or any(arch.windows) else TAIL_ROWS
        # A step of one shape may feed rows beyond the context, one of a tree needs one to spare.
        num_rows = length + max(num_tail_rows, FIXED_ROWS) + 1
        grid = _FIXED_GRID if deterministic else _ROW_GRID
        with torch.inference_mode():
            model = LlamaModel(
                folder,
                arch,
                dtype=torch_dtype,
                device=torch.device(device),
                vocab_size=vocab_size,
                num_rows=-(-num_rows // grid) * grid,
                num_threads=num_threads,
            )
            self._free = [_Slot(model.new_cache()) for _ in range(num_slots)]
        self._model: LlamaModel | None = model
        self._slots: dict[int, _Slot] = {}
        self._num_embeddings = arch.vocab_size
        on_gpu = model.device.type == "cuda"
        graphs = use_graphs and on_gpu
        self._meanwhile = Meanwhile()
        self._capture = capture = Capture(Recorder(model.device)) if graphs else None
        self._steps: StaticSteps | None = None
        if deterministic or graphs:
            fixed_rows = FIXED_ROWS if deterministic else None
            self._steps = StaticSteps(
                model,
                vocab_size,
                fixed_rows=fixed_rows,
                capture=capture,
                launched=self._meanwhile.launched,
            )
        self._trees: TreeSteps | None = None
        if graphs and num_tail_rows:
            spare_row = model.num_rows - 1
            self._trees = TreeSteps(model, vocab_size, spare_row=spare_row, capture=capture)
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
            attention=f"sdpa {str(model.cache_dtype).removeprefix('torch.')}"
            + (", graphs" if graphs else ""),
            frees_processor=on_gpu,
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """See `draw_rows`."""
        own_draws = None if self._steps is None else self._row_draws
        with self._meanwhile.step(sum(len(row.ids) for row in rows)):
            return draw_rows(
                rows,
                self._info,
                self._num_embeddings,
                lambda row: self._launched(self._row_logits(row)),
                own_draws,
            )

    @torch.inference_mode()
    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        """See `ModelRunner`.

        Raises:
            PipeSpecError: as `forward`.
        """
        with self._meanwhile.step(len(row.row.ids) + len(row.tail)):
            return rank_tree(
                row,
                self._info,
                self._num_embeddings,
                lambda tree: self._launched(self._tree_logits(tree)),
            )

    def while_computing(self, do: Callable[[float], None]) -> None:
        """See `WaitingRunner`."""
        self._meanwhile.do = do

    @torch.inference_mode()
    def logits(self, row: Row) -> Tensor:
        """Feeds the row and returns what its draws would be made of: [num_draws, vocab_size]
        float32, on the device."""
        check_row(row, self._info, self._num_embeddings)
        return self._row_logits(row).to(torch.float32, copy=True)

    def release(self, slot: int) -> None:
        freed = self._slots.pop(slot, None)
        if freed is not None:
            freed.length = 0
            freed.visible.clear()
            self._free.append(freed)

    def close(self) -> None:
        if self._model is None:
            return
        # After a capture that failed, torch before 2.12 believes that it still goes on and refuses
        # to give memory back (pytorch/pytorch#180395).
        has_failed = self._capture is not None and self._capture.has_failed
        can_empty = self._model.device.type == "cuda" and not has_failed
        self._model = self._steps = self._trees = self._capture = None
        self._slots.clear()
        self._free.clear()
        if can_empty:
            torch.cuda.empty_cache()

    def _launched(self, logits: Tensor) -> Tensor:
        """The same, once the processor has had the time until they are there."""
        self._meanwhile.launched()
        return logits

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
        own = range(row.start, slot.length)
        tail_positions = [item.position for item in tree.tail]
        visible = [*map(slot.sees, own), *(slot.visible[item.row] for item in tree.tail)]
        ids = [*row.ids, *(item.token for item in tree.tail)]
        logits: Tensor | None = None
        if self._trees is not None:
            tail_rows = [item.row for item in tree.tail]
            tokens = TreeTokens(ids, [*own, *tail_positions], [*own, *tail_rows], visible)
            logits = self._trees.logits(slot.cache, tokens)
        if logits is not None:
            return logits[len(row.ids) - row.num_draws :]
        tail = Tail(tree.tail[0].row, tail_positions, visible)
        hidden = model.forward(ids, row.start, slot.cache, tail)
        return model.logits(hidden[len(row.ids) - row.num_draws :])

    def _row_draws(self, row: Row) -> list[int] | None:
        """Forwards one checked row, if its draws can be made where its logits are."""
        steps = self._steps
        if steps is None or not steps.can_draw(row):
            return None
        slot = self._rolled_back(row)
        draws = steps.draws(slot.cache, row.ids, row.start, row.sampling)
        slot.length = row.start + len(row.ids)
        return draws[-row.num_draws :]

    def _row_logits(self, row: Row) -> Tensor:
        """Forwards one checked row. Returns [num_draws, vocab_size] in the model's dtype, perhaps
        in memory that the next step overwrites."""
        slot = self._rolled_back(row)
        num_static = 0 if self._steps is None else self._steps.num_static(row)
        if self._steps is None or num_static == 0:
            return self._chunk_logits(row, slot)
        first = len(row.ids) - num_static
        if first:
            self._prefill(row.ids[:first], row.start, slot)
        logits = self._steps.logits(slot.cache, row.ids[first:], row.start + first)
        slot.length = row.start + len(row.ids)
        return logits[-row.num_draws :]

    def _rolled_back(self, row: Row) -> _Slot:
        """The row's slot, holding no more than what the row follows."""
        assert self._model is not None, "the runner is closed"
        slot = self._slot(row.slot)
        assert row.start <= slot.length, "a gap between what the slot holds and the row"
        slot.length = row.start
        return slot

    def _prefill(self, ids: Sequence[int], first: int, slot: _Slot) -> None:
        """Feeds tokens after which nothing is drawn, on the absolute grid of chunks."""
        assert self._model is not None
        for start, stop in chunks(first, len(ids), on_grid=True):
            self._model.forward(ids[start - first : stop - first], start, slot.cache)
            slot.length = stop

    def _chunk_logits(self, row: Row, slot: _Slot) -> Tensor:
        """Forwards a row in as few pieces as may be."""
        model = self._model
        assert model is not None
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
