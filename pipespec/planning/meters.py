"""The models of a hierarchy as processes to be measured: starts them, asks them, ends them.

Whatever ends the measurement, an error, Ctrl-C or `close()`, the processes are reaped and their
directory is gone; if this process is killed, they see it and end by themselves.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from pipespec import errors
from pipespec.errors import StageError, UsageError
from pipespec.interrupts import hold_interrupts
from pipespec.placement import StagePlacement
from pipespec.planning.meter import write_stage
from pipespec.stage_process import stage_environment
from pipespec.worker_spec import StageSpec, make_run_dir

METER: Final = (sys.executable, "-m", "pipespec.planning.meter")
ANSWER_TIMEOUT_S: Final = 1800.0  # for one question; a long text of a large model
_END_TIMEOUT_S: Final = 3.0
_READ_TIMEOUT_S: Final = 60.0  # for a process that waits to read the next part of a question
_TAIL_LINES: Final = 20


class Meters:
    """Processes that hold one model each. A context manager; `start` as many as needed.

    command: what starts one; its directory is appended.
    """

    def __init__(self, command: Sequence[str] = METER) -> None:
        self._command = tuple(command)
        self._run_dir = make_run_dir()
        self._started: list[MeterProcess] = []

    def start(self, stage: StageSpec) -> MeterProcess:
        """A process where the stage's placement says; it loads nothing until it is asked to."""
        log_path = self._run_dir / f"meter-{len(self._started)}.log"
        process = MeterProcess(stage, log_path)
        with hold_interrupts():  # a process that exists is in `_started`
            process.spawn((*self._command, str(self._run_dir)), os.environ)
            self._started.append(process)
        return process

    def close(self) -> None:
        """Ends all processes and removes their directory. Idempotent; takes a few seconds."""
        with hold_interrupts():
            for process in self._started:
                process.hang_up()
            for process in self._started:
                process.close()
            self._started.clear()
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class MeterProcess:
    """One of them. One question at a time: `send`, then `receive`; or `ask`, which does both."""

    def __init__(self, stage: StageSpec, log_path: Path) -> None:
        self.stage = stage
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the process; its log is kept from other users."""
        placement: StagePlacement = self.stage.placement
        log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment, **stage_environment(placement, environment)},
                bufsize=0,
            )
        finally:
            os.close(log)

    def load(self, **values: Any) -> None:
        """Begins to load the stage's model; `receive` gives its runner's facts."""
        self.send("load", stage=write_stage(self.stage), **values)

    def ask(self, what: str, **values: Any) -> Any:
        """One question and its answer; raises as `receive`."""
        self.send(what, **values)
        return self.receive()

    def send(self, what: str, **values: Any) -> None:
        """Puts a question; raises as `receive`. The process reads it at once."""
        assert self._process is not None and self._process.stdin is not None
        left = json.dumps({"what": what, **values}).encode() + b"\n"
        descriptor = self._process.stdin.fileno()
        try:
            while left:
                if not select.select([], [descriptor], [], _READ_TIMEOUT_S)[1]:
                    raise StageError(f"{self}: it does not listen", self._log_tail())
                left = left[os.write(descriptor, left[: select.PIPE_BUF]) :]
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The answer to the question that was sent last.

        Raises:
            UsageError: the model cannot be loaded; its own line.
            StageError: the process failed or did not answer in time.
        """
        reply = json.loads(self._read_line(time.monotonic() + timeout_s, timeout_s))
        if "fault" not in reply:
            return reply["answer"]
        fault = reply["fault"]
        kind = getattr(errors, fault["kind"], None)
        if isinstance(kind, type) and issubclass(kind, UsageError):
            raise kind(fault["message"])
        reason = " ".join(f"{fault['kind']}: {fault['message']}".split())
        raise StageError(f"{self} failed: {reason}", tuple(fault["traceback"].splitlines()))

    def hang_up(self) -> None:
        """Ends its input; the process ends after what it is doing."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Ends the process: gently by the end of its input, else by force."""
        self.hang_up()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdout is not None
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10.0)
        process.stdout.close()

    def __str__(self) -> str:
        return f"measuring {self.stage.model.name}"

    def _read_line(self, deadline_s: float, timeout_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([descriptor], [], [], left_s)[0]:
                raise StageError(f"{self}: no answer for {timeout_s:g} s", self._log_tail())
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise self._ended()
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _ended(self) -> StageError:
        assert self._process is not None
        try:
            code = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return StageError(f"{self}: it closed its output", self._log_tail())
        hint = "; perhaps the system ran out of memory" if code == -9 else ""
        return StageError(f"{self}: its process ended with status {code}{hint}", self._log_tail())

    def _log_tail(self) -> tuple[str, ...]:
        try:
            text = self._log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ()
        return tuple(text.splitlines()[-_TAIL_LINES:])
