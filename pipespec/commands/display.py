"""What a person sees while models load and samples run: bars on a terminal, lines elsewhere.

Nothing here runs in a thread of its own: greedy and chain decode in this process, and a bar that
redraws itself would take its time from theirs. Bars are redrawn when there is news, twice a second
at most.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipespec.commands.entry import CommandConsole, print_line
from pipespec.config import ModelConfig
from pipespec.launcher import OnProgress
from pipespec.stage_process import StageStatus

REDRAW_EVERY_S: Final = 0.5
LINE_EVERY_S: Final = 5.0
LOADING_LINE_EVERY_S: Final = 30.0
PLAIN_WIDTH: Final = 100


def make_console(*, stderr: bool = False) -> Console:
    """Standard output, or stderr; where that is a file or a pipe, wide enough for the table."""
    console = CommandConsole(highlight=False, stderr=stderr)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


class SampleProgress:
    """Counts what is generated, and shows it through `show(num_done, note)`, now and then."""

    def __init__(self, show: Callable[[int, str], None], every_s: float, num_done: int) -> None:
        self._show = show
        self._every_s = every_s
        self._num_done = num_done
        self._num_tokens = 0
        self._seconds = 0.0
        self._num_characters = 0
        self._shown_at = time.monotonic()

    def on_text(self, piece: str) -> None:
        """A piece of the sample in progress."""
        self._num_characters += len(piece)
        if time.monotonic() - self._shown_at > self._every_s:
            self._redraw(f"{self._num_characters:,} characters of the next")

    def on_sample(self, num_tokens: int, seconds: float) -> None:
        """A sample is done."""
        self._num_done += 1
        self._num_tokens += num_tokens
        self._seconds += seconds
        self._num_characters = 0
        if time.monotonic() - self._shown_at > self._every_s:
            self._redraw()

    def _redraw(self, *notes: str) -> None:
        speed = [f"{self._num_tokens / self._seconds:,.1f} tokens/s"] if self._seconds else []
        self._show(self._num_done, ", ".join([*speed, *notes]))
        self._shown_at = time.monotonic()


class Display:
    """Shows what a command does, on one console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str) -> None:
        """A line that stays."""
        print_line(self.console, text)

    def command(self, text: str) -> None:
        """A command to be copied: one line, however long."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def news(self) -> Iterator[Callable[[str], None]]:
        """The value says where a command stands, each text in place of the former one."""
        if not self.console.is_terminal:
            yield self.line
            return
        with self._bars(TextColumn("{task.description}", markup=False)) as bars:
            task = bars.add_task("")
            yield lambda text: bars.update(task, description=text, refresh=True)

    @contextlib.contextmanager
    def loading(self, strategy: str, models: Sequence[ModelConfig]) -> Iterator[OnProgress]:
        """Shows that models load; the value is for the decoder, which tells of each stage."""
        names = " ".join(model.name for model in (models[-1:] if strategy == "greedy" else models))
        if not self.console.is_terminal:
            self.line(f"{strategy}: loading {names}")
            yield _phase_lines(strategy, self.line)
            return
        with self._bars(TextColumn("{task.description}", markup=False)) as bars:
            bars.add_task(f"{strategy}: loading {names}")
            bars.refresh()
            yield _phase_rows(bars)

    @contextlib.contextmanager
    def samples(self, strategy: str, num_done: int, num_samples: int) -> Iterator[SampleProgress]:
        """Shows how many samples of a strategy are done and how fast they were."""
        if not self.console.is_terminal:

            def write(count: int, note: str) -> None:
                self.line(f"{strategy}: {count}/{num_samples} samples, {note}")

            yield SampleProgress(write, LINE_EVERY_S, num_done)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with self._bars(*columns) as bars:
            task = bars.add_task(strategy, total=num_samples, completed=num_done, note="")
            bars.refresh()

            def redraw(count: int, note: str) -> None:
                bars.update(task, completed=count, note=note, refresh=True)

            yield SampleProgress(redraw, REDRAW_EVERY_S, num_done)

    @contextlib.contextmanager
    def parts(self, what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
        """Shows how many parts of some work are done; the value is to be told of each. total: None
        where nobody knows."""
        count, shown_at = 0, time.monotonic()
        if not self.console.is_terminal:

            def tell(part: str) -> None:
                nonlocal count, shown_at
                count += 1
                if time.monotonic() - shown_at > LINE_EVERY_S:
                    self.line(f"{what}: {count}{f'/{total}' if total else ''}, {part}")
                    shown_at = time.monotonic()

            yield tell
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with self._bars(*columns) as bars:
            task = bars.add_task(what, total=total, note="")
            bars.refresh()

            def advance(part: str) -> None:
                nonlocal shown_at
                is_due = time.monotonic() - shown_at > REDRAW_EVERY_S
                shown_at = time.monotonic() if is_due else shown_at
                bars.update(task, advance=1, note=part, refresh=is_due)

            yield advance

    def _bars(self, *columns: TextColumn | BarColumn | MofNCompleteColumn) -> Progress:
        return Progress(*columns, console=self.console, auto_refresh=False, transient=True)


def _describe(status: StageStatus) -> str:
    return f"stage {status.index} ({status.name}): {status.phase}"


def _phase_lines(strategy: str, write: Callable[[str], None]) -> OnProgress:
    """A line when a stage enters a phase, and one now and then while it stays there."""
    said: dict[int, tuple[str, float]] = {}

    def on_progress(statuses: tuple[StageStatus, ...]) -> None:
        for status in statuses:
            phase, at_s = said.get(status.index, ("", 0.0))
            is_waiting = status.phase not in ("ready", "serving")
            is_late = is_waiting and status.elapsed_s - at_s >= LOADING_LINE_EVERY_S
            if status.phase != phase or is_late:
                said[status.index] = (status.phase, status.elapsed_s)
                write(f"{strategy}: {_describe(status)}, {status.elapsed_s:.1f} s")

    return on_progress


def _phase_rows(bars: Progress) -> OnProgress:
    """A row for each stage, redrawn in place."""
    drawn_at = float("-inf")

    def on_progress(statuses: tuple[StageStatus, ...]) -> None:
        nonlocal drawn_at
        if time.monotonic() - drawn_at < REDRAW_EVERY_S:
            return
        drawn_at = time.monotonic()
        rows = bars.task_ids[1:] or [bars.add_task("") for _ in statuses]
        for row, status in zip(rows, statuses, strict=True):
            bars.update(row, description=f"  {_describe(status)}, {status.elapsed_s:.0f} s")
        bars.refresh()

    return on_progress
