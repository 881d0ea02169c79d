"""A transport that tells a `Tracer` what it sent and how long that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pipespec.messages import Frame, Link, Stats
from pipespec.trace.events import Tracer
from pipespec.trace.state import describe, flow_of
from pipespec.transport import Transport


class TracedTransport:
    """Passes everything on to `transport`, which its owner closes."""

    def __init__(
        self,
        transport: Transport,
        tracer: Tracer,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._transport = transport
        self._tracer = tracer
        self._clock = clock
        self.receive = transport.receive
        self.has_frames = transport.has_frames
        self.close = transport.close

    @property
    def num_malformed(self) -> int:
        """See `Transport`."""
        return self._transport.num_malformed

    @property
    def descriptors(self) -> Sequence[int]:
        """See `Transport.descriptors`."""
        return self._transport.descriptors

    def send(self, link: Link, frame: Frame) -> bool:
        """See `Transport.send`. What a full link did not take was not sent."""
        start_s = self._clock()
        is_sent = self._transport.send(link, frame)
        if is_sent:
            name = f"send {type(frame.message).__name__}"
            self._tracer.add(name, start_s, self._clock(), flow_of(frame), **describe(frame))
            if isinstance(frame.message, Stats):  # the text is done, and nobody waits for more
                self._tracer.flush()
        return is_sent
