"""Events of one stage: kept in memory while it runs, and handed over.

To note one takes a few microseconds. A stage that runs as a process appends what it has to a file
whenever a text is done, so that little is lost with a stage that dies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack

log = logging.getLogger(__name__)

MAX_EVENTS: Final = 200_000  # of a stage; some 40 MB of the written file

# What a stage does, in the order in which tables and pictures have it.
FORWARDS: Final = ("prefill", "decode", "draft", "prepare", "verify")
WAIT: Final = "wait"
DECIDE: Final = "decide"  # what the next step is
APPLY: Final = "apply"  # what a forward drew
ROLLBACK: Final = "rollback"


class Event(NamedTuple):
    """Something that took from start_s to end_s on the host's monotonic clock (the same: an
    instant). flow: names the message that was sent or received, "" if none; its other end has the
    same."""

    name: str
    start_s: float
    end_s: float
    flow: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageTrace:
    """What one stage noted, under the name of its model."""

    name: str
    events: list[Event]
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class StrategyTrace:
    """All stages of one strategy while its models were loaded, first draft first."""

    strategy: str
    stages: tuple[StageTrace, ...] = field(repr=False)


OnTrace = Callable[[StrategyTrace], None]


class Tracer:
    """Notes events, the first `limit` of them; counts the others.

    path: where `flush` appends them; None keeps them in memory.
    """

    def __init__(self, path: Path | None = None, limit: int = MAX_EVENTS) -> None:
        self.events: list[Event] = []
        self.num_dropped = 0
        self._path = path
        self._num_left = limit

    def add(self, name: str, start_s: float, end_s: float, flow: str = "", **args: Any) -> None:
        """Notes an event; `args` are shown with it."""
        if self._num_left > 0:
            self._num_left -= 1
            self.events.append(Event(name, start_s, end_s, flow, args))
        else:
            self.num_dropped += 1

    def flush(self) -> None:
        """Appends to the file what it does not have yet. A disk that is full costs the events, not
        the run."""
        if self._path is None or not (self.events or self.num_dropped):
            return
        try:
            with self._path.open("ab") as file:
                file.write(msgpack.packb([self.num_dropped, self.events]))
        except OSError as error:
            log.warning("%d events are lost: %s", len(self.events), error)
            self.num_dropped += len(self.events)
        self.events = []

    def trace(self, name: str) -> StageTrace:
        """What is in memory, for the stage of this name."""
        return StageTrace(name, self.events, self.num_dropped)


def read_events(path: Path, name: str) -> StageTrace:
    """What a stage's `Tracer` appended to the file; nothing if it never did. What was cut off by
    the end of its process is left out."""
    events: list[Event] = []
    num_dropped = 0
    if not path.exists():
        return StageTrace(name, events)
    with path.open("rb") as file:
        for num_dropped_so_far, batch in msgpack.Unpacker(file, max_buffer_size=0):
            num_dropped = num_dropped_so_far
            events += [Event(*values) for values in batch]
    return StageTrace(name, events, num_dropped)
