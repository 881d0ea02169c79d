"""CUDA graphs, and the small messages that go with them: what in the runners is CUDA's own.

Rules of capture that are kept here and by who calls (torch.cuda.graph): a side stream, work run
there before, no look at a value on the host, shapes that depend on no value, addresses that outlive
the graph, one pool of memory for graphs that are replayed one at a time and whose results are read
before the next replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

import torch

log = logging.getLogger(__name__)

_NUM_WARM_UPS: Final = 2
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
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
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


class Words:
    """Integers that live on the host and on the device: written on one side, copied to the other.
    On the CPU both are the same memory and nothing is copied.

    host: [count] int64, pinned if there is something to copy. device: the same there.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(count, dtype=torch.int64, pin_memory=on_gpu)
        self.device = self.host.to(device)
        # Made on the device when first recorded; until then there is nothing to wait for.
        self._copied: torch.cuda.Event | None = None
        if on_gpu:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the last copy is done: then the host may write, or read."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self) -> None:
        """Starts the copy to the device."""
        if self._copied is not None:
            self.device.copy_(self.host, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self.device.device))

    def fetch(self) -> None:
        """Starts the copy to the host."""
        if self._copied is not None:
            self.host.copy_(self.device, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self.device.device))
