"""The models of a hierarchy as processes to be measured: starts them, asks them, ends them.

Whatever ends the measurement, an error, Ctrl-C or `close()`, the processes are reaped and their
directory is gone; if this process is killed, they see it and end by themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from pipespec import errors
from pipespec.errors import StageError, UsageError
from pipespec.interrupts import hold_interrupts
from pipespec.messages import Fault
from pipespec.stage_process import stage_environment
from pipespec.worker_spec import StageSpec, make_run_dir

METER: Final = (sys.executable, "-m", "pipespec.planning.meter")
ANSWER_TIMEOUT_S: Final = 1800.0  # for one question; a long text of a large model
_END_TIMEOUT_S: Final = 3.0
_TAIL_LINES: Final = 20


class Meters:
    """Processes that hold one model each. A context manager; `start` as many as needed.

    command: what starts one; a descriptor of its end of a connection and its directory are
    appended.
    """

    def __init__(self, command: Sequence[str] = METER) -> None:
        self._command = tuple(command)
        self._run_dir = make_run_dir()
        self._started: list[MeterProcess] = []

    def start(self, stage: StageSpec) -> MeterProcess:
        """A process where the stage's placement says; it loads nothing until it is asked to."""
        log_path = self._run_dir / f"meter-{len(self._started)}.log"
        with hold_interrupts():  # a process that exists is in `_started`
            self._started.append(MeterProcess(stage, self._command, log_path))
        return self._started[-1]

    def close(self) -> None:
        """Ends all processes and removes their directory. Idempotent; takes a few seconds."""
        with hold_interrupts():
            for process in self._started:
                process.hang_up()
            for process in self._started:
                process.reap()
            self._started.clear()
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class MeterProcess:
    """One of them. One question at a time: `send`, then `receive`; or `ask`, which does both."""

    def __init__(self, stage: StageSpec, command: Sequence[str], log_path: Path) -> None:
        self._name = stage.model.name
        self._stage = stage
        self._log_path = log_path
        self._connection, theirs = multiprocessing.Pipe()
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                (*command, str(theirs.fileno()), str(log_path.parent)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **stage_environment(stage.placement, os.environ)},
                pass_fds=(theirs.fileno(),),
            )
        finally:
            os.close(log)
            theirs.close()

    def load(self, **values: Any) -> None:
        """Begins to load the stage's model; `receive` gives its runner's facts."""
        self.send("load", stage=self._stage, **values)

    def ask(self, what: str, **values: Any) -> Any:
        """One question and its answer; raises as `receive`."""
        self.send(what, **values)
        return self.receive()

    def send(self, what: str, **values: Any) -> None:
        """Puts a question, which the process reads at once; raises as `receive`."""
        try:
            self._connection.send((what, values))
        except OSError:
            raise self._ended() from None

    def receive(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The answer to the question that was sent last.

        Raises:
            UsageError: the model cannot be loaded; its own line.
            StageError: the process failed or did not answer in time.
        """
        try:
            if not self._connection.poll(timeout_s):
                raise StageError(f"{self}: no answer for {timeout_s:g} s", self._log_tail())
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if not isinstance(answer, Fault):
            return answer
        kind = getattr(errors, answer.kind, None)
        if isinstance(kind, type) and issubclass(kind, UsageError):
            raise kind(answer.message)
        reason = " ".join(f"{answer.kind}: {answer.message}".split())
        raise StageError(f"{self} failed: {reason}", tuple(answer.traceback.splitlines()))

    def hang_up(self) -> None:
        """Closes the connection; the process ends after what it is doing."""
        self._connection.close()

    def reap(self) -> None:
        """Waits for the end of the process, and brings it about if that takes long."""
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10.0)

    def __str__(self) -> str:
        return f"measuring {self._name}"

    def _ended(self) -> StageError:
        self.reap()
        code = self._process.returncode
        hint = "; perhaps the system ran out of memory" if code == -9 else ""
        return StageError(f"{self}: its process ended with status {code}{hint}", self._log_tail())

    def _log_tail(self) -> tuple[str, ...]:
        try:
            text = self._log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ()
        return tuple(text.splitlines()[-_TAIL_LINES:])
