"""Reading result files for a command: what is passed over is named on stderr, and whoever waits
for more than a second is told how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pipespec.commands.display import LINE_EVERY_S, REDRAW_EVERY_S, Display, make_console
from pipespec.results import RunExtract, find_files, read_runs

T = TypeVar("T")
FIRST_AFTER_S: Final = 1.0


def read_results(
    paths: Iterable[Path],
    keep: Callable[[Mapping[str, Any]], T],
    *,
    on_skip: Callable[[str], None] = lambda _: None,
    on_file: Callable[[Path], None] = lambda _: None,
) -> list[RunExtract[T]]:
    """`read_runs` of files and folders, with news of it on stderr. on_skip, on_file: are told what
    `read_runs` tells, too.

    Raises:
        DataError: as `read_runs`.
    """
    display = Display(make_console(stderr=True))
    files = find_files(paths)
    with display.news() as tell:
        every_s = REDRAW_EVERY_S if display.console.is_terminal else LINE_EVERY_S
        progress = _Progress(tell, len(files), every_s)

        def keep_and_tell(result: Mapping[str, Any]) -> T:
            progress.on_sample()
            return keep(result)

        def skip_and_tell(line: str) -> None:
            display.line(line)
            on_skip(line)

        def begin_and_tell(path: Path) -> None:
            progress.on_file(path)
            on_file(path)

        return read_runs(files, keep_and_tell, skip_and_tell, begin_and_tell)


class _Progress:
    """Says which file is read and how many samples it had, now and then."""

    def __init__(self, tell: Callable[[str], None], num_files: int, every_s: float) -> None:
        self._tell = tell
        self._num_files = num_files
        self._every_s = every_s
        self._due_at = time.monotonic() + FIRST_AFTER_S
        self._num_files_begun = 0
        self._num_samples = 0
        self._name = ""

    def on_file(self, path: Path) -> None:
        """The next file is opened."""
        self._num_files_begun += 1
        self._num_samples = 0
        self._name = path.name

    def on_sample(self) -> None:
        """A sample of it was read."""
        self._num_samples += 1
        now = time.monotonic()
        if now >= self._due_at:
            self._due_at = now + self._every_s
            self._tell(
                f"reading file {self._num_files_begun} of {self._num_files}, {self._name}: "
                f"{self._num_samples} samples"
            )
