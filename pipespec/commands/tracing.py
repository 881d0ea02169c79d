"""The trace file of a command: collects what strategies did and which sample was when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pipespec.commands.display import Display
from pipespec.errors import UsageError
from pipespec.interrupts import hold_interrupts
from pipespec.results.paths import ensure_writable_file
from pipespec.trace import StrategyTrace
from pipespec.trace.chrome import Group, write_trace
from pipespec.trace.events import MAX_EVENTS, Event


class TraceRecorder:
    """Writes the file when it is closed, whatever ended the command; a context manager.

    Samples come before the strategy that wrote them: what that did is known when its models are
    closed.
    """

    def __init__(self, path: Path) -> None:
        """Raises UsageError if the file cannot be written."""
        ensure_writable_file(path, "--trace")
        self.path = path
        self._groups: list[Group] = []
        self._samples: list[Event] = []

    def add(self, trace: StrategyTrace) -> None:
        """A strategy has closed its models."""
        self._groups.append((trace, self._samples))
        self._samples = []

    def add_sample(self, name: str, start_s: float, end_s: float) -> None:
        """A text was written, or given up."""
        self._samples.append(Event(name, start_s, end_s, "", {}))

    def describe(self) -> str:
        """One line on the file, once it is written."""
        stages = [stage for group, _ in self._groups for stage in group.stages]
        num_dropped = sum(stage.num_dropped for stage in stages)
        line = f"trace: {sum(len(stage.events) for stage in stages):,} events in {self.path}"
        if num_dropped:
            line += f"; {num_dropped:,} later ones are left out, a stage keeps {MAX_EVENTS:,}"
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            with hold_interrupts():
                write_trace(self.path, self._groups)
        except UsageError as unwritten:
            if error is None:
                raise
            error.add_note(str(unwritten))
        else:
            if error is not None:
                error.add_note(f"what happened until then is in {self.path}")


@contextlib.contextmanager
def noted(trace: TraceRecorder | None, name: str) -> Iterator[None]:
    """Within it a text is written, of which the trace, if there is one, shall say when."""
    start_s = time.perf_counter()
    try:
        yield
    finally:
        if trace is not None:
            trace.add_sample(name, start_s, time.perf_counter())


@contextlib.contextmanager
def tracing(path: Path | None, display: Display) -> Iterator[TraceRecorder | None]:
    """What `--trace` asks for: a recorder, whose file is written on every way out."""
    if path is None:
        yield None
        return
    with TraceRecorder(path) as recorder:
        yield recorder
    display.line(recorder.describe())
