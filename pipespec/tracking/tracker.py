"""The seam between a command and whatever keeps its numbers: a tracker of the command opens one
tracker for each of its runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

Result = Mapping[str, Any]  # one item of a result file's `results`
Decode = Callable[[Sequence[int]], str]


class RunTracker(Protocol):
    """Of one strategy's run. Nothing that goes wrong with tracking is raised."""

    def log_sample(self, result: Result, metadata: Mapping[str, Any]) -> None:
        """A sample that is on the disk, and what is known of its run by now."""
        ...

    def log_end(
        self,
        results: Sequence[Result],
        metadata: Mapping[str, Any],
        greedy: Sequence[Result],
        decode: Decode,
    ) -> None:
        """The whole run, and the greedy run that it is compared with, if there is one. decode: the
        text of token ids."""
        ...


class Tracker(Protocol):
    """Of a command."""

    def run(
        self, metadata: Mapping[str, Any], directory: Path
    ) -> AbstractContextManager[RunTracker]:
        """For the time of one strategy's run, of which this is known before it starts. directory:
        for files of the tracker's own."""
        ...


class NullTracker:
    """Keeps nothing. A `Tracker` and a `RunTracker`."""

    @contextlib.contextmanager
    def run(self, metadata: Mapping[str, Any], directory: Path) -> Iterator[RunTracker]:
        yield self

    def log_sample(self, result: Result, metadata: Mapping[str, Any]) -> None:
        pass

    def log_end(
        self,
        results: Sequence[Result],
        metadata: Mapping[str, Any],
        greedy: Sequence[Result],
        decode: Decode,
    ) -> None:
        pass
