"""Decode steps of fixed shapes at fixed addresses: what a CUDA graph can hold, and what gives the
same bits every time.

A *static step* is one forward of a text's last tokens that reads its ids, positions and noise from
buffers: what it does depends on (query length, cache rows looked at) alone. On a GPU it is
captured once and replayed: one copy of a few hundred bytes in, two launches (the forward; the
draws), one copy back, one wait. What cannot be captured runs eagerly, after one line in the log.
The graph-free half (buckets, buffers, masks by position) runs on the CPU as well, where it must
equal the ordinary forward.

Rules of capture that this file keeps (torch.cuda.graph): a side stream, work run there before, no
look at a value on the host, shapes that depend on no value, addresses that outlive the graph, one
pool for graphs that are replayed one at a time and whose results are read before the next replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipespec.config import SamplingParams
from pipespec.runners.base import Row
from pipespec.runners.llama_model import KeyValues, LlamaModel
from pipespec.runners.rows import bucket
from pipespec.sampling import damaged_logits, draw_on_device, keeps_all, philox_constants

log = logging.getLogger(__name__)

MAX_ROWS: Final = 32  # longer queries gain little from a graph
FIXED_ROWS: Final = 8  # of every step, where all steps have one shape
_NUM_WARM_UPS: Final = 2
_NUM_CONSTANTS: Final = 22  # see `philox_constants`
Work = Callable[[], None]


class Graph(Protocol):
    """Work that was captured."""

    def replay(self) -> None: ...


class Capture:
    """Turns work into graphs.

    If one cannot be captured, none is used any more: destroying the failed one may take with it
    library workspaces on the stream that the others' kernels point to.
    """

    def __init__(self, record: Callable[[Work], Graph]) -> None:
        self._record = record
        self.has_failed = False

    def __call__(self, work: Work) -> Work:
        """Something that does `work` each time it is called, by a graph if that can be."""
        if self.has_failed:
            return work
        try:
            graph = self._record(work)
        except RuntimeError as error:  # torch's errors of CUDA and of its allocator are such
            self.has_failed = True
            reason = " ".join(str(error).split())[:200]
            log.warning("CUDA graphs cannot be captured, steps run eagerly: %s", reason)
            return work
        return lambda: work() if self.has_failed else graph.replay()


class Recorder:
    """Captures work on one stream, into graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Graph:
        before = torch.cuda.current_stream(self._device)
        # A capture that fails leaves its stream current; the outer context takes it back.
        with torch.cuda.device(self._device), torch.cuda.stream(before):
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                for _ in range(_NUM_WARM_UPS):
                    work()
            before.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        return graph


class Buffers:
    """What goes in and out of the steps of one query length; every tensor keeps its address.

    ids, positions: [rows] int64, of the tokens that are fed. logits: [rows, vocab_size].
    """

    def __init__(self, rows: int, model: LlamaModel, vocab_size: int) -> None:
        device = model.device
        self.rows = rows
        self._is_on_host = device.type == "cpu"
        num_words = 2 * rows + _NUM_CONSTANTS + 1
        self._host = _host_words(num_words, device)
        self._words = self._host.numpy()
        self._temperature = self._words[-1:].view(np.float64)
        self._device_words = (
            self._host
            if self._is_on_host
            else torch.zeros(num_words, dtype=torch.int64, device=device)
        )
        self.ids = self._device_words[:rows]
        self.positions = self._device_words[rows : 2 * rows]
        self.logits = torch.zeros(rows, vocab_size, dtype=model.dtype, device=device)
        self._drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self._host_drawn = _host_words(rows, device)
        self._sent, self._received = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, ids: Sequence[int], start: int, sampling: SamplingParams) -> None:
        """Writes what the next step reads. Rows beyond `ids` take token 0 at the positions that
        follow: nothing before them sees what they leave in the cache."""
        rows, count, words = self.rows, len(ids), self._words
        assert 0 < count <= rows
        if not self._is_on_host:
            self._sent.synchronize()  # the last copy may not have read its source yet
        words[:count] = ids
        words[count:rows] = 0
        words[rows : 2 * rows] = np.arange(start, start + rows)
        if not sampling.is_greedy:
            words[2 * rows : -1] = philox_constants(sampling.seed).flatten().numpy()
            self._temperature[0] = sampling.temperature
        if not self._is_on_host:
            self._device_words.copy_(self._host, non_blocking=True)
            self._sent.record(torch.cuda.current_stream(self.ids.device))

    def draw_greedily(self) -> None:
        """The most likely token of each row."""
        self._draw(None)

    def draw_with_noise(self) -> None:
        """The token of each row under the noise that `fill` was told of."""
        self._draw(self._device_words[2 * self.rows : -1].view(-1, 2))

    def _draw(self, constants: Tensor | None) -> None:
        temperature = self._device_words[-1:].view(torch.float64)[0]
        drawn = draw_on_device(self.logits, self.positions + 1, temperature, constants)
        self._drawn.copy_(drawn)

    def take_draws(self, count: int) -> list[int]:
        """The draws of the first `count` rows; waits for them.

        Raises:
            PipeSpecError: logits without a finite maximum.
        """
        self._host_drawn.copy_(self._drawn, non_blocking=True)
        if not self._is_on_host:
            self._received.record(torch.cuda.current_stream(self.ids.device))
            self._received.synchronize()
        draws: list[int] = self._host_drawn[:count].tolist()
        if min(draws) < 0:
            raise damaged_logits()
        return draws


class StaticSteps:
    """The static steps of a model, made when they are first used.

    fixed_rows: every step feeds so many rows and looks at the whole cache; what a row gives is
    then a function of its text alone, bit for bit, if the kernels keep to that (`determinism`
    tests it). None: a step feeds what it is given and looks at the smallest bucket that holds it.
    capture: makes graphs of them; None runs them eagerly.
    """

    def __init__(
        self,
        model: LlamaModel,
        vocab_size: int,
        *,
        fixed_rows: int | None = None,
        capture: Capture | None = None,
    ) -> None:
        self._model, self._vocab_size = model, vocab_size
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
        with _attention_kernel(model.device):
            hidden = model.forward_at(buffers.ids, buffers.positions, cache, capacity)
        model.logits_into(hidden, buffers.logits)

    def _prepared(self, work: Work) -> Work:
        return work if self._capture is None else self._capture(work)


def _host_words(count: int, device: torch.device) -> Tensor:
    """[count] int64 on the host; pinned, if they are to be copied to a GPU or from it."""
    return torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")


def _attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """One kernel for all shapes on a GPU: the one for any mask (flash attention takes none), so
    that versions and shapes do not silently choose another."""
    if device.type == "cpu":
        return nullcontext()
    kernel: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return kernel
