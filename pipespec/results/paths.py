"""Where a run's result goes, and what to do with what is there already.

Decided before any model is loaded, so that nothing is computed that cannot be kept.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from pipespec.errors import DataError, UsageError
from pipespec.results.metadata import metadata_differences
from pipespec.results.reading import load_results, read_partial


class OutputPlan(Enum):
    """What a command does about one result file."""

    SKIP = "skip"  # the very same run is there, finished
    RUN = "run"  # from the first sample
    RESUME = "resume"  # after the samples of an interrupted run


def result_file_name(
    strategy: str, model_names: Sequence[str], lookahead: int | None, auto: bool = False
) -> str:
    """`{strategy}_{name}-{name}[_{lookahead}|_auto].json`, as the original names its files.

    Greedy is the target's alone: only the last name, no lookahead.
    """
    if strategy == "greedy":
        return f"greedy_{model_names[-1]}.json"
    assert auto or lookahead is not None
    return f"{strategy}_{'-'.join(model_names)}_{'auto' if auto else lookahead}.json"


def partial_path(path: Path) -> Path:
    """The file that holds the samples finished so far while `path` is being made."""
    return path.with_name(path.name + ".partial")


def plan_output(
    path: Path, wanted: Mapping[str, Any], *, force: bool = False, resume: bool = False
) -> OutputPlan:
    """What to do for the run that `wanted` (of `run_metadata`) describes.

    Nothing that took time to compute is overwritten without `force`: neither a finished file of
    another run nor the samples of an interrupted one.

    Raises:
        UsageError: the file at `path` is of another run (names the keys), an interrupted run is
            there and neither flag says what to do with it, or the folder cannot be written.
    """
    if force and resume:
        raise UsageError("--force and --resume contradict each other; pass one of them")
    partial = partial_path(path)
    if _exists(partial) and not force:
        if resume:
            _check_same(partial, read_partial(partial).metadata or wanted, wanted)
            ensure_writable(path.parent)
            return OutputPlan.RESUME
        if not _exists(path):
            num_done = len(read_partial(partial).results)
            raise UsageError(
                f"{partial} holds {num_done} samples of an unfinished run; --resume goes on "
                "after them, --force starts over"
            )
    if _exists(path) and not force:
        try:
            stored = load_results(path).metadata
        except DataError as error:
            raise DataError(f"{error}; --force overwrites it") from error
        _check_same(path, stored, wanted)
        return OutputPlan.SKIP
    ensure_writable(path.parent)
    return OutputPlan.RUN


def ensure_writable(folder: Path) -> None:
    """Makes the folder if need be and tries to write there.

    Raises:
        UsageError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"--output-dir: cannot write to {folder} ({reason}); name another folder"
        ) from error


def ensure_writable_file(path: Path, flag: str) -> None:
    """Tries whether the file that `flag` names can be written, before anything is computed for it.

    Raises:
        UsageError: it cannot; names flag and file.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{flag}: {path} is a folder; name a file")
        if not path.parent.is_dir():
            raise UsageError(f"{flag}: there is no folder {path.parent} to write {path.name} into")
        if not path.exists():
            with tempfile.TemporaryFile(dir=path.parent) as probe:
                probe.write(b"x")
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{flag}: cannot write {path} ({reason}); name another file") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UsageError(f"--output-dir: cannot use {path} ({error.strerror or error})") from error


def _check_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = metadata_differences(stored, wanted)
    if differences:
        raise UsageError(
            f"{path} is of another run: {', '.join(differences)}; --force overwrites it, "
            "another --output-dir keeps it"
        )
