"""One worker process as its launcher sees it: how it is started, how it ended, what it logged.

What the worker does, and what it says over its link, is not known here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pipespec
from pipespec.interrupts import hold_interrupts
from pipespec.messages import Fault, Heartbeat
from pipespec.placement import StagePlacement
from pipespec.worker_spec import StageSpec

_TAIL_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Where a stage stands. phase: "starting", "loading", "warming up", "ready" or "serving"."""

    index: int
    name: str
    pid: int
    phase: str
    elapsed_s: float


@dataclass(slots=True)
class StageProcess:
    """A worker and what is known of it. Everything from `phase` on is what it reported.

    num_idle_reports: a stage that serves sends a heartbeat about once a second while it has nothing
    to compute, and none during a forward.
    """

    index: int
    spec: StageSpec
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    phase: str = "starting"
    endpoint: str | None = None
    load_s: float | None = None
    info: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    num_idle_reports: int = 0
    fault: Fault | None = None

    def __str__(self) -> str:
        return f"stage {self.index} ({self.spec.model.name})"

    @property
    def is_ready(self) -> bool:
        return self.load_s is not None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the worker, its output going to its log, which is kept from others."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self.log_path, flags, 0o600)
        try:
            with hold_interrupts():  # a process that exists is in `process`
                self.process = subprocess.Popen(
                    [*command, "--stage", str(self.index), "--run-dir", str(self.log_path.parent)],
                    stdin=subprocess.DEVNULL,
                    stdout=descriptor,
                    stderr=subprocess.STDOUT,
                    env={**environment, **stage_environment(self.spec.placement, environment)},
                )
        finally:
            os.close(descriptor)

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Notes what the stage says of itself."""
        self.phase, self.counters = heartbeat.phase, heartbeat.counters
        self.num_idle_reports += heartbeat.phase == "serving"

    @property
    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def wait(self, timeout_s: float) -> bool:
        """Whether the process has ended, and is reaped, after at most `timeout_s`."""
        if self.process is None:
            return True
        try:
            self.process.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal unless the process has ended."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def describe_end(self) -> str:
        """How the stage failed, in a clause: what it said itself, else what the system knows."""
        if self.fault is not None:
            return f"failed: {_one_line(f'{self.fault.kind}: {self.fault.message}')}".rstrip(": ")
        code = None if self.process is None else self.process.poll()
        while_phase = "" if self.phase == "serving" else f" while {self.phase}"
        if code is None:
            return f"does not answer{while_phase}"
        if code >= 0:
            return f"ended with exit status {code}{while_phase}"
        hint = "; perhaps the system ran out of memory" if code == -signal.SIGKILL else ""
        return f"was killed by signal {-code} ({_signal_name(-code)}){while_phase}{hint}"

    def log_tail(self, num_lines: int) -> tuple[str, ...]:
        """The last lines of the log, oldest first; none if there is no log."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ()
        return tuple(text.splitlines()[-num_lines:]) if num_lines > 0 else ()


def stage_environment(placement: StagePlacement, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables that must be set before a worker's interpreter starts.

    Thread pools are sized when their library loads, and a GPU that the process can see costs it
    memory for a context even if it is not used.
    """
    threads = str(placement.threads)
    variables = {
        "CUDA_VISIBLE_DEVICES": ",".join(placement.visible_devices),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {**variables, **source_environment(inherited)}


def source_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What lets another interpreter find this code: nothing where it is installed."""
    source = str(Path(pipespec.__file__).resolve().parent.parent)
    if source in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    # A checkout that is not installed: the process shall run this code, whatever its folder.
    paths = [source, *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
