"""Moves frames between stages and their launcher: over ZMQ sockets, or within one process.

Nothing here blocks on a peer. `send` hands a frame over or says that the link is full; `receive`
waits for at most a given time and then returns everything there is. A link may lose frames when a
peer dies, and never reorders what it delivers. What a frame means is not known here.

ZMQ links are DEALER to DEALER: they reconnect, and a full one refuses instead of dropping in
silence. The end that lives longer or listens for others binds (launcher; the later stage), the
other connects. A link has exactly one peer: DEALER would share messages out among several, so
nothing else may reach the endpoint. An ipc endpoint lies in a directory that only its user may
enter. On tcp, where every user of the host could connect, `Keys` do the same.

A ZMQ context starts its I/O thread with its first socket, and a thread inherits the affinity of
the thread that makes it. Open the first link *before* pinning the main thread, else the I/O thread
competes with the model for the core it is pinned to and frames wait for milliseconds.
"""

from __future__ import annotations

import logging
import math
import select
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, Protocol, Self, TypeVar

import zmq

from pipespec.errors import ProtocolError, UsageError
from pipespec.messages import MAX_FRAME_BYTES, Frame, Link, decode, encode

log = logging.getLogger(__name__)

HIGH_WATER: Final = 1024  # frames that may wait at each end of a link
LINGER_S: Final = 0.5  # what close() grants the last frames
_MAX_LOGGED_KINDS: Final = 32
_IPC: Final = "ipc://"
_FINE_WAIT_S: Final = 0.01
_MAX_SELECT_FD: Final = 1023

K = TypeVar("K", bound=Hashable)


class Transport(Protocol):
    """What a stage needs to exchange frames with its neighbours and its launcher."""

    @property
    def num_malformed(self) -> int:
        """Frames that were not of the protocol: dropped, counted, logged once per kind of error."""
        ...

    def send(self, link: Link, frame: Frame) -> bool:
        """Queues the frame. Never blocks; False means the link is full and took nothing."""
        ...

    def receive(self, timeout_s: float) -> list[tuple[Link, Frame]]:
        """Waits at most `timeout_s` for a first frame, then takes all that are there.

        Frames of one link keep their order; those of different links have none.
        """
        ...

    @property
    def descriptors(self) -> Sequence[int]:
        """Of files; one of them can be read soon after a frame has arrived."""
        ...

    def has_frames(self) -> bool:
        """Whether `receive` would return at least one."""
        ...

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Keys:
    """One CURVE key pair for a whole run (z85 text). Only who knows it can open a tcp link."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def generate(cls) -> Keys:
        """A fresh pair.

        Raises:
            UsageError: this libzmq has no CURVE.
        """
        if not zmq.has("curve"):
            raise UsageError("--transport tcp needs a libzmq built with CURVE; use --transport ipc")
        public, secret = zmq.curve_keypair()
        return cls(public.decode("ascii"), secret.decode("ascii"))


class ZmqTransport(Generic[K]):
    """Links over ZMQ, named by any hashable: a stage's by `Link`, a launcher's by stage index.

    One thread uses it. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        *,
        high_water: int = HIGH_WATER,
        linger_s: float = LINGER_S,
        keys: Keys | None = None,
    ) -> None:
        self.num_malformed = 0
        self._high_water = high_water
        self._linger_ms = round(linger_s * 1000)
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: dict[K, zmq.Socket[bytes]] = {}
        self._links: dict[zmq.Socket[bytes], K] = {}
        self._files: dict[K, Path] = {}
        self._poller = zmq.Poller()
        self._fds: list[int] = []
        self._logged: set[str] = set()

    def bind(self, link: K, endpoint: str) -> str:
        """Opens the end that listens, at "ipc://PATH" or "tcp://127.0.0.1:*" (any free port).

        Returns:
            The endpoint to connect to, with the port that was found.
        """
        socket = self._open(link)
        if self._keys is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.bind(endpoint)
        option = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(option, bytes)
        bound = option.rstrip(b"\0").decode()
        if bound.startswith(_IPC):
            self._files[link] = Path(bound.removeprefix(_IPC))
        return bound

    def connect(self, link: K, endpoint: str) -> None:
        """Opens the end that connects; the other end need not be there yet. Replaces the link if
        it is open: its peer was started anew and listens elsewhere."""
        socket = self._open(link)
        if self._keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.public.encode("ascii"))
        socket.connect(endpoint)

    def send(self, link: K, frame: Frame) -> bool:
        """See `Transport.send`. A listening link without a peer is full.

        Raises:
            ProtocolError: the frame is larger than any receiver takes.
        """
        data = encode(frame)
        if len(data) > MAX_FRAME_BYTES:
            kind = type(frame.message).__name__
            raise ProtocolError(f"{kind} of {len(data)} bytes; the limit is {MAX_FRAME_BYTES}")
        try:
            self._sockets[link].send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> list[tuple[K, Frame]]:
        """See `Transport.receive`. At most `high_water` frames of each link in one call."""
        assert self._fds, "no link is open"
        received: list[tuple[K, Frame]] = []
        deadline = time.monotonic() + timeout_s
        while True:
            for socket in self._sockets.values():
                self._drain(socket, received)
            left_s = deadline - time.monotonic()
            if received or left_s <= 0:
                return received
            self._wait(left_s)

    @property
    def descriptors(self) -> Sequence[int]:
        """See `Transport.descriptors`."""
        return self._fds

    def has_frames(self) -> bool:
        """See `Transport.has_frames`."""
        return any(map(_has_frames, self._links))

    def receive_from(self, link: K, timeout_s: float) -> list[Frame]:
        """Like `receive`, for one link; frames of the others stay where they are."""
        socket = self._sockets[link]
        received: list[tuple[K, Frame]] = []
        if socket.poll(math.ceil(timeout_s * 1000)):
            self._drain(socket, received)
        return [frame for _, frame in received]

    def drop(self, link: K) -> None:
        """Closes a link at once; what it has not delivered is lost. Nothing if it is closed."""
        if link in self._sockets:
            self._sockets[link].setsockopt(zmq.LINGER, 0)
            self._discard(link)

    def close(self) -> None:
        """See `Transport.close`. Takes at most `linger_s`; removes the files of ipc endpoints."""
        for link in list(self._sockets):
            self._discard(link)
        if not self._context.closed:
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _open(self, link: K) -> zmq.Socket[bytes]:
        self._discard(link)
        socket = self._context.socket(zmq.DEALER)
        self._sockets[link] = socket
        socket.setsockopt(zmq.LINGER, self._linger_ms)
        socket.setsockopt(zmq.SNDHWM, self._high_water)
        socket.setsockopt(zmq.RCVHWM, self._high_water)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)  # ms, doubling up to:
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if self._keys is not None:
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public.encode("ascii"))
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode("ascii"))
        self._links[socket] = link
        self._poller.register(socket, zmq.POLLIN)
        self._fds.append(socket.fileno())
        return socket

    def _discard(self, link: K) -> None:
        socket = self._sockets.pop(link, None)
        if socket is None:
            return
        if socket in self._links:
            del self._links[socket]
            self._poller.unregister(socket)
            self._fds.remove(socket.fileno())
        socket.close()
        if link in self._files:  # libzmq leaves it behind
            self._files.pop(link).unlink(missing_ok=True)

    def _drain(self, socket: zmq.Socket[bytes], received: list[tuple[K, Frame]]) -> None:
        link = self._links[socket]
        for _ in range(self._high_water):
            if not _has_frames(socket):  # to ask and to be refused takes three times as long
                return
            try:
                received.append((link, decode(socket.recv(zmq.NOBLOCK))))
            except ProtocolError as error:
                self._count_malformed(link, error)

    def _wait(self, timeout_s: float) -> None:
        """Returns when a socket may have something to read, or after `timeout_s`.

        A wait for drafts is often shorter than the millisecond that zmq_poll() counts in, so short
        waits use select(). The sockets' descriptors signal *changes*: this is sound only because
        a read that found nothing has just taken note of all earlier ones.
        """
        if timeout_s < _FINE_WAIT_S and max(self._fds) <= _MAX_SELECT_FD:
            select.select(self._fds, (), (), timeout_s)
        else:
            self._poller.poll(math.ceil(timeout_s * 1000))

    def _count_malformed(self, link: K, error: ProtocolError) -> None:
        self.num_malformed += 1
        text = str(error)[:200]
        if text not in self._logged and len(self._logged) < _MAX_LOGGED_KINDS:
            self._logged.add(text)
            log.warning("dropped a malformed frame on link %s: %s", link, text)


def _has_frames(socket: zmq.Socket[bytes]) -> bool:
    """Costs a tenth of zmq_poll()."""
    events = socket.getsockopt(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)


class MemoryTransport(Generic[K]):
    """Links within one process, for drivers that step all stages themselves.

    The same contract as `ZmqTransport` without encoding: frames are frozen values, so both ends
    may hold the same one. `receive` never waits: in one thread, nothing can arrive meanwhile.
    """

    def __init__(self, high_water: int = HIGH_WATER) -> None:
        self.num_malformed = 0
        self._high_water = high_water
        self._inboxes: dict[K, deque[Frame]] = {}
        self._outboxes: dict[K, deque[Frame]] = {}

    def send(self, link: K, frame: Frame) -> bool:
        """See `Transport.send`."""
        outbox = self._outboxes[link]
        if len(outbox) >= self._high_water:
            return False
        outbox.append(frame)
        return True

    def receive(self, timeout_s: float = 0.0) -> list[tuple[K, Frame]]:
        """See `Transport.receive`; `timeout_s` is not used."""
        received: list[tuple[K, Frame]] = []
        for link, inbox in self._inboxes.items():
            received.extend((link, frame) for frame in inbox)
            inbox.clear()
        return received

    @property
    def descriptors(self) -> Sequence[int]:
        """See `Transport.descriptors`: there are none."""
        return ()

    def has_frames(self) -> bool:
        """See `Transport.has_frames`."""
        return any(self._inboxes.values())

    def close(self) -> None:
        """See `Transport.close`."""
        for inbox in self._inboxes.values():
            inbox.clear()

    def attach(self, link: K, inbox: deque[Frame], outbox: deque[Frame]) -> None:
        """Opens a link that reads from one queue and writes to another."""
        self._inboxes[link] = inbox
        self._outboxes[link] = outbox


def connect_in_memory(
    num_stages: int, high_water: int = HIGH_WATER
) -> tuple[tuple[MemoryTransport[Link], ...], MemoryTransport[int]]:
    """The transports of a whole hierarchy: one per stage, first draft first, and the launcher's,
    whose links are the stage indexes."""
    launcher: MemoryTransport[int] = MemoryTransport(high_water)
    stages: list[MemoryTransport[Link]] = []
    for index in range(num_stages):
        stage: MemoryTransport[Link] = MemoryTransport(high_water)
        to_stage: deque[Frame] = deque()
        to_launcher: deque[Frame] = deque()
        launcher.attach(index, inbox=to_launcher, outbox=to_stage)
        stage.attach(Link.LAUNCHER, inbox=to_stage, outbox=to_launcher)
        if stages:
            downward: deque[Frame] = deque()
            upward: deque[Frame] = deque()
            stages[-1].attach(Link.DOWN, inbox=upward, outbox=downward)
            stage.attach(Link.UP, inbox=downward, outbox=upward)
        stages.append(stage)
    return tuple(stages), launcher
