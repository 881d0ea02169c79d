"""Decode steps of fixed shapes at fixed addresses: what a CUDA graph can hold, and what gives the
same bits every time.

A *static step* is one forward of a text's last tokens that reads its ids, positions and noise from
buffers: what it does depends on (query length, cache rows looked at) alone. On a GPU it is
captured once and replayed: one copy of a few hundred bytes in, two launches (the forward; the
draws), one copy back, one wait. What cannot be captured runs eagerly, after one line in the log.
All but the capture itself runs on the CPU as well, where it must equal the ordinary forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipespec.config import SamplingParams
from pipespec.runners.base import Row
from pipespec.runners.capture import Capture, Words, Work
from pipespec.runners.llama_model import KeyValues, LlamaModel, Places
from pipespec.runners.rows import bucket
from pipespec.sampling import damaged_logits, draw_on_device, keeps_all, philox_constants

MAX_ROWS: Final = 32  # longer queries gain little from a graph
FIXED_ROWS: Final = 8  # of every step, where all steps have one shape
_NUM_CONSTANTS: Final = 22  # see `philox_constants`


class Buffers:
    """What goes in and out of the steps of one query length; every tensor keeps its address.

    ids, positions: [rows] int64, of the tokens that are fed. logits: [rows, vocab_size].
    """

    def __init__(self, rows: int, model: LlamaModel, vocab_size: int) -> None:
        self.rows = rows
        self._input = Words(2 * rows + _NUM_CONSTANTS + 1, model.device)
        self._words = self._input.host.numpy()
        self._temperature = self._words[-1:].view(np.float64)
        self.ids = self._input.device[:rows]
        self.positions = self._input.device[rows : 2 * rows]
        self.logits = torch.zeros(rows, vocab_size, dtype=model.dtype, device=model.device)
        self._drawn = Words(rows, model.device)

    def fill(self, ids: Sequence[int], start: int, sampling: SamplingParams) -> None:
        """Writes what the next step reads. Rows beyond `ids` take token 0 at the positions that
        follow: nothing before them sees what they leave in the cache."""
        rows, count, words = self.rows, len(ids), self._words
        assert 0 < count <= rows
        self._input.wait()
        words[:count] = ids
        words[count:rows] = 0
        words[rows : 2 * rows] = np.arange(start, start + rows)
        if not sampling.is_greedy:
            words[2 * rows : -1] = philox_constants(sampling.seed).flatten().numpy()
            self._temperature[0] = sampling.temperature
        self._input.send()

    def draw_greedily(self) -> None:
        """The most likely token of each row."""
        self._draw(None)

    def draw_with_noise(self) -> None:
        """The token of each row under the noise that `fill` was told of."""
        self._draw(self._input.device[2 * self.rows : -1].view(-1, 2))

    def _draw(self, constants: Tensor | None) -> None:
        temperature = self._input.device[-1:].view(torch.float64)[0]
        drawn = draw_on_device(self.logits, self.positions + 1, temperature, constants)
        self._drawn.device.copy_(drawn)

    def take_draws(self, count: int) -> list[int]:
        """The draws of the first `count` rows; waits for them.

        Raises:
            PipeSpecError: logits without a finite maximum.
        """
        self._drawn.fetch()
        self._drawn.wait()
        draws: list[int] = self._drawn.host[:count].tolist()
        if min(draws) < 0:
            raise damaged_logits()
        return draws


class StaticSteps:
    """The static steps of a model, made when they are first used.

    fixed_rows: every step feeds so many rows and looks at the whole cache; what a row gives is
    then a function of its text alone, bit for bit, if the kernels keep to that (`determinism`
    tests it). None: a step feeds what it is given and looks at the smallest bucket that holds it.
    capture: makes graphs of them; None runs them eagerly. launched: is called when a step and its
    draws are, before they are waited for.
    """

    def __init__(
        self,
        model: LlamaModel,
        vocab_size: int,
        *,
        fixed_rows: int | None = None,
        capture: Capture | None = None,
        launched: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._tell_launched = launched
        self._fixed_rows = fixed_rows
        self._capture = capture
        self._buffers: dict[int, Buffers] = {}
        self._forwards: dict[tuple[KeyValues, int, int], Work] = {}
        self._draws: dict[tuple[int, bool], Work] = {}

    def num_static(self, row: Row) -> int:
        """How many of a row's ids, the last ones, are to be fed by static steps."""
        if self._fixed_rows is not None:
            return row.num_draws  # what is before them is a prompt
        return len(row.ids) if len(row.ids) <= MAX_ROWS else 0

    def can_draw(self, row: Row) -> bool:
        """Whether `draws` serves the row."""
        most = self._fixed_rows or MAX_ROWS
        return self.num_static(row) == len(row.ids) <= most and keeps_all(row.sampling)

    def logits(self, cache: KeyValues, ids: Sequence[int], start: int) -> Tensor:
        """Feeds `ids` from position `start`. Returns [len(ids), vocab_size]; it may be overwritten
        by the next step."""
        most = self._fixed_rows or MAX_ROWS
        if len(ids) <= most:
            return self._step(cache, ids, start, SamplingParams()).logits[: len(ids)]
        pieces = []
        for first in range(0, len(ids), most):
            piece = ids[first : first + most]
            logits = self._step(cache, piece, start + first, SamplingParams()).logits
            pieces.append(logits[: len(piece)].clone())
        return torch.cat(pieces)

    def draws(
        self, cache: KeyValues, ids: Sequence[int], start: int, sampling: SamplingParams
    ) -> list[int]:
        """Feeds `ids` from position `start` and returns the token that is drawn after each.

        Raises:
            PipeSpecError: see `Buffers.take_draws`.
        """
        buffers = self._step(cache, ids, start, sampling)
        key = (buffers.rows, sampling.is_greedy)
        if key not in self._draws:
            work = buffers.draw_greedily if sampling.is_greedy else buffers.draw_with_noise
            self._draws[key] = self._prepared(work)
        self._draws[key]()
        self._tell_launched()
        return buffers.take_draws(len(ids))

    def _step(
        self, cache: KeyValues, ids: Sequence[int], start: int, sampling: SamplingParams
    ) -> Buffers:
        rows = self._fixed_rows or len(ids)
        num_rows = self._model.num_rows
        capacity = num_rows if self._fixed_rows else bucket(start + rows, num_rows)
        if rows not in self._buffers:
            self._buffers[rows] = Buffers(rows, self._model, self._vocab_size)
        buffers = self._buffers[rows]
        buffers.fill(ids, start, sampling)
        key = (cache, rows, capacity)
        if key not in self._forwards:
            self._model.workspace(rows)  # its addresses are not to come from a graph's pool
            self._forwards[key] = self._prepared(lambda: self._forward(buffers, cache, capacity))
        self._forwards[key]()
        return buffers

    def _forward(self, buffers: Buffers, cache: KeyValues, capacity: int) -> None:
        model = self._model
        with attention_kernel(model.device):
            masks = model.masks.at_positions(buffers.positions, capacity)
            places = Places(buffers.positions, buffers.positions, masks, capacity)
            hidden = model.forward_at(buffers.ids, places, cache)
        model.logits_into(hidden, buffers.logits)

    def _prepared(self, work: Work) -> Work:
        return work if self._capture is None else self._capture(work)


def attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """One kernel for all shapes on a GPU: the one for any mask (flash attention takes none), so
    that versions and shapes do not silently choose another."""
    if device.type == "cpu":
        return nullcontext()
    kernel: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return kernel
