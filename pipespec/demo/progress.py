"""How a training run tells what it is doing: one small message, shown as a bar or as a line.

The trainers know only `Report`, a function that takes a `Progress`; the command decides whether a
person is watching (bars) or a log file is written (a line every few seconds).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

LINE_EVERY_S = 15.0


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of one job, and a note such as the loss or the speed."""

    job: str
    done: int
    total: int
    note: str = ""


Report = Callable[[Progress], None]


class ProgressDisplay:
    """Shows progress on a console while it is entered; `show` is a `Report`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line_at: dict[str, float] = {}

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Move a job's bar, or write its line unless it had one just now; the last is written."""
        if self._console.is_terminal:
            if progress.job not in self._tasks:
                self._tasks[progress.job] = self._bars.add_task(progress.job, note="")
            self._bars.update(
                self._tasks[progress.job],
                completed=progress.done,
                total=progress.total,
                note=progress.note,
            )
            return
        now = time.monotonic()
        since_last_s = now - self._last_line_at.get(progress.job, float("-inf"))
        if since_last_s >= LINE_EVERY_S or progress.done == progress.total:
            self._last_line_at[progress.job] = now
            line = f"{progress.job}: {progress.done:,}/{progress.total:,} {progress.note}"
            self._console.print(f"{now - self._started:7.1f} s  {line.rstrip()}", markup=False)
