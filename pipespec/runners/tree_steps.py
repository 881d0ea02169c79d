"""Static steps of a text with branches beside it: each token says which cache rows it sees.

Like `graphs`, for `forward_tree`. The number of tokens varies from step to step, so steps are made
for multiples of eight; what is left over is fed into a cache row that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from pipespec.runners.capture import Capture, Words, Work
from pipespec.runners.graphs import attention_kernel
from pipespec.runners.llama_model import KeyValues, LlamaModel, Places
from pipespec.runners.masks import MAX_SHORT
from pipespec.runners.rows import bucket

_GRID: Final = 8
_BITS: Final = 64


@dataclass(frozen=True, slots=True)
class TreeTokens:
    """Tokens to feed: for each its id, position, cache row, and the rows that it sees, itself
    included, as bits."""

    ids: Sequence[int]
    positions: Sequence[int]
    rows: Sequence[int]
    visible: Sequence[int]


class TreeSteps:
    """The static steps of a model's trees, made when they are first used.

    spare_row: of the caches, never looked at.
    """

    def __init__(
        self, model: LlamaModel, vocab_size: int, *, spare_row: int, capture: Capture | None
    ) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._spare_row, self._capture = spare_row, capture
        self._buffers: dict[tuple[int, int], _Buffers] = {}
        self._forwards: dict[tuple[KeyValues, int, int], Work] = {}

    def logits(self, cache: KeyValues, tokens: TreeTokens) -> Tensor | None:
        """Feeds the tokens. Returns [tokens, vocab_size], which the next step may overwrite; None,
        and nothing is fed, if they are too many."""
        count = len(tokens.ids)
        rows = -(-count // _GRID) * _GRID
        if rows > MAX_SHORT:
            return None
        capacity = bucket(1 + max(tokens.rows), self._model.num_rows)
        shape, key = (rows, capacity), (cache, rows, capacity)
        if shape not in self._buffers:
            self._buffers[shape] = _Buffers(rows, capacity, self._model, self._vocab_size)
        buffers = self._buffers[shape]
        buffers.fill(tokens, self._spare_row)
        if key not in self._forwards:
            self._forwards[key] = self._new_forward(cache, buffers, capacity)
        self._forwards[key]()
        return buffers.logits[:count]

    def _new_forward(self, cache: KeyValues, buffers: _Buffers, capacity: int) -> Work:
        model = self._model
        model.workspace(len(buffers.ids))  # its addresses are not to come from a graph's pool

        def forward() -> None:
            with attention_kernel(model.device):
                masks = model.masks.of_words(buffers.visible)
                places = Places(buffers.positions, buffers.rows, masks, capacity)
                hidden = model.forward_at(buffers.ids, places, cache)
            model.logits_into(hidden, buffers.logits)

        return forward if self._capture is None else self._capture(forward)


class _Buffers:
    """What goes in and out of the steps of one shape; every tensor keeps its address."""

    def __init__(self, rows: int, capacity: int, model: LlamaModel, vocab_size: int) -> None:
        assert capacity % _BITS == 0
        self._num_bytes = capacity // 8
        self._input = Words(3 * rows + rows * capacity // _BITS, model.device)
        device = self._input.device
        self.ids, self.positions, self.rows = device[: 3 * rows].view(3, rows).unbind()
        self.visible = device[3 * rows :].view(rows, -1)
        self.logits = torch.zeros(rows, vocab_size, dtype=model.dtype, device=model.device)
        words = self._input.host.numpy()
        self._numbers = words[: 3 * rows].reshape(3, rows)
        self._seen = words[3 * rows :].view(np.uint8).reshape(rows, self._num_bytes)

    def fill(self, tokens: TreeTokens, spare_row: int) -> None:
        """Writes what the next step reads."""
        self._input.wait()
        count = len(tokens.ids)
        for numbers, values in zip(self._numbers, (tokens.ids, tokens.positions, tokens.rows)):
            numbers[:count] = values
        self._numbers[:2, count:] = 0
        self._numbers[2, count:] = spare_row
        packed = b"".join(bits.to_bytes(self._num_bytes, "little") for bits in tokens.visible)
        self._seen[:count] = np.frombuffer(packed, np.uint8).reshape(count, self._num_bytes)
        self._seen[count:] = 0
        self._seen[count:, 0] = 1  # a row that sees nothing would be divided by zero
        self._input.send()
