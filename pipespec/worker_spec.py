"""The run directory, and what a launcher tells its workers in it: one JSON file.

Both sides take the digest of what they understood; a worker of another version, or one that reads
another run's file, says so in its `Hello` instead of doing something else than it was told.
This module starts nothing and imports no model code.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pipespec.config import ModelConfig, Schedule
from pipespec.errors import StageError, UsageError
from pipespec.placement import StagePlacement
from pipespec.transport import Keys

SPEC_NAME: Final = "spec.json"
_MAX_SOCKET_PATH: Final = 107  # bytes; what a unix socket's address holds
_LONGEST_SOCKET_NAME: Final = len("/1022-1023.1000000")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One worker's part.

    folder, tokenizer_folder: where the files of the model and its tokenizer are, None where there
    are none. endpoint: where the launcher listens for this stage. incarnation: counts the
    processes of the stage.
    """

    model: ModelConfig
    placement: StagePlacement
    folder: str | None
    tokenizer_folder: str | None
    endpoint: str = ""
    incarnation: int = 1


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What all workers of a run are told, first draft first.

    transport: "ipc" or "tcp". keys: of the tcp links. tokenizer_digest: of the tokenizer that all
    stages share, as the launcher knows it; "" is not compared. num_slots: requests that a stage
    holds at once. ready_timeout_s: how long the launcher waits for all stages to load. trace:
    stages note what they do, in files beside this one.
    """

    launcher_pid: int
    transport: str
    keys: Keys | None
    schedule: Schedule
    vocab_size: int
    context_length: int | None
    tokenizer_digest: str
    num_slots: int
    ready_timeout_s: float
    stages: tuple[StageSpec, ...]
    trace: bool = False

    @property
    def digest(self) -> str:
        """A fingerprint of every field, the same in all processes."""
        return hashlib.sha256(_to_json(self).encode()).hexdigest()


def make_run_dir() -> Path:
    """A new directory that only this user may enter, its path short enough for unix sockets.

    Raises:
        UsageError: the directory for temporary files has too long a path, or is not writable.
    """
    longest = _MAX_SOCKET_PATH - len("/ps-12345678") - _LONGEST_SOCKET_NAME
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > longest:
        base = "/tmp"
    try:
        return Path(tempfile.mkdtemp(prefix="ps-", dir=base))  # mode 0700
    except OSError as error:
        raise UsageError(f"TMPDIR: no run directory can be made in {base}: {error}") from error


def endpoint_in(run_dir: Path, transport: str, name: str) -> str:
    """Where to listen: a socket called `name` in the run directory, or any free loopback port."""
    return "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{run_dir}/{name}"


def trace_path(run_dir: Path, stage: int) -> Path:
    """Where a stage puts its events."""
    return run_dir / f"stage-{stage}.trace"


def write_spec(run_dir: Path, spec: RunSpec) -> None:
    """Writes the file, readable by this user only and never seen half-written."""
    partial = run_dir / f"{SPEC_NAME}.partial"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(_to_json(spec))
    partial.replace(run_dir / SPEC_NAME)


def read_spec(run_dir: Path) -> RunSpec:
    """Reads what `write_spec` wrote.

    Raises:
        StageError: the file is missing, or written by another version of PipeSpec.
    """
    path = run_dir / SPEC_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stages = tuple(
            StageSpec(
                **{
                    **stage,
                    "model": _restore(ModelConfig, stage["model"]),
                    "placement": _restore(StagePlacement, stage["placement"]),
                }
            )
            for stage in values.pop("stages")
        )
        keys = values.pop("keys")
        return RunSpec(
            **{
                **values,
                "keys": None if keys is None else Keys(**keys),
                "schedule": _restore(Schedule, values["schedule"]),
                "stages": stages,
            }
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StageError(f"{path} is not a worker's specification: {error}") from error


def _to_json(spec: RunSpec) -> str:
    return json.dumps(spec, default=_plain, sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return os.fspath(value)


def _restore(kind: type[T], values: Mapping[str, Any]) -> T:
    """JSON knows no tuples; the sequences of our configuration values all are."""
    return kind(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )
