"""Which cached positions each fed token sees, as attention wants it. Knows no weights.

Three ways to say it: tokens that continue a text (masks cut from a table that grows), branches of a
text (bits for each token), and a tensor of positions (shapes that depend on no value, so that a
CUDA graph can hold it).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipespec.runners.architecture import Architecture

MAX_SHORT = 64  # query lengths up to this keep their buffers and masks
_MASK_OF_BIT = np.array([-np.inf, 0.0], dtype=np.float32)
LayerMasks = list[tuple[Tensor | None, bool]]  # for each layer attention's mask and is_causal


class Masks:
    """The masks of one model.

    num_rows: of a cache. Heads that share keys are folded into the rows of short queries, so each
    mask row stands there once for each of them.
    """

    def __init__(
        self, arch: Architecture, num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._windows = arch.windows
        self._group = arch.num_heads // arch.num_kv_heads
        self._num_rows, self._dtype, self._device = num_rows, dtype, device
        self._tables: dict[int | None, Tensor] = {}  # by window
        self._columns = torch.arange(num_rows, device=device)

    def of_text(self, rows: int, end: int) -> LayerMasks:
        """For the last `rows` of the positions up to `end`."""
        masks = {window: self._of_text(rows, end, window) for window in set(self._windows)}
        return [masks[window] for window in self._windows]

    def of_branches(self, visible: Sequence[int], end: int) -> LayerMasks:
        """For tokens that see the cache rows whose bits are set in `visible`."""
        num_bytes = (end + 7) // 8
        packed = b"".join(bits.to_bytes(num_bytes, "little") for bits in visible)
        table = np.frombuffer(packed, np.uint8).reshape(len(visible), num_bytes)
        seen = np.unpackbits(table, axis=1, count=end, bitorder="little")
        mask = torch.from_numpy(_MASK_OF_BIT[seen]).to(self._device, self._dtype)
        repeats = self._repeats(len(visible))
        mask = mask if repeats == 1 else mask.repeat_interleave(repeats, dim=0)
        return [(mask, False)] * len(self._windows)

    def at_positions(self, positions: Tensor, capacity: int) -> LayerMasks:
        """For tokens at `positions` [rows] of a text, over the first `capacity` cache rows."""
        masks = {w: (self._at_positions(positions, capacity, w), False) for w in set(self._windows)}
        return [masks[window] for window in self._windows]

    def of_words(self, visible: Tensor) -> LayerMasks:
        """For tokens that see the cache rows whose bits are set in `visible` [tokens, words] int64:
        row r is bit r % 64 of word r // 64."""
        bits = torch.arange(64, device=self._device)
        seen = (visible.unsqueeze(2) >> bits).bitwise_and_(1).flatten(1)
        return [(self._folded(seen == 0), False)] * len(self._windows)

    def _at_positions(self, positions: Tensor, capacity: int, window: int | None) -> Tensor:
        columns, at = self._columns[:capacity], positions.unsqueeze(1)
        hidden = columns > at
        if window is not None:
            hidden |= columns <= at - window
        return self._folded(hidden)

    def _folded(self, hidden: Tensor) -> Tensor:
        """0 or -inf where `hidden` [rows, columns], for each of the heads that share keys; for
        short queries only."""
        assert len(hidden) <= MAX_SHORT
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, -torch.inf)
        return mask.unsqueeze(1).expand(-1, self._group, -1).reshape(-1, hidden.shape[1])

    def _repeats(self, rows: int) -> int:
        """How often each row's mask stands there; `Workspace` folds heads by the same rule."""
        return self._group if rows <= MAX_SHORT else 1

    def _of_text(self, rows: int, end: int, window: int | None) -> tuple[Tensor | None, bool]:
        unlimited = window is None or end <= window
        if rows == 1 and unlimited:
            return None, False
        repeats = self._repeats(rows)
        if rows == end and unlimited and repeats == 1:
            return None, True
        if rows > MAX_SHORT:
            return self._new_table(rows, end, window, repeats), False
        table = self._table(rows, end, window, repeats)
        mask = table[table.shape[0] - rows * repeats :, table.shape[1] - end :]
        # Kernels on a GPU may want a mask that starts at an aligned address.
        return mask.contiguous() if self._device.type == "cuda" else mask, False

    def _table(self, rows: int, end: int, window: int | None, repeats: int) -> Tensor:
        """A mask of at least `rows` and `end` columns, from which smaller ones are cut: counted
        from the last row and column all are alike. It doubles when a text or query outgrows it."""
        table = self._tables.get(window)
        height, width = (0, 0) if table is None else (table.shape[0] // repeats, table.shape[1])
        if table is None or height < rows or width < end:
            width = min(self._num_rows, _power_of_two(max(256, width, end)))
            height = min(width, _power_of_two(max(16, height, rows)))
            table = self._tables[window] = self._new_table(height, width, window, repeats)
        return table

    def _new_table(self, rows: int, width: int, window: int | None, repeats: int) -> Tensor:
        """[rows * repeats, width], 0 or -inf: row r stands at column width - rows + r."""
        columns = self._columns[:width]
        at = columns[width - rows :].unsqueeze(1)
        hidden = columns > at
        if window is not None:
            hidden |= columns <= at - window
        mask = torch.zeros(rows, width, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, -torch.inf).repeat_interleave(repeats, dim=0)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
