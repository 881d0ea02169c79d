"""A process group of its own for whoever races, with one pipe in and one out. Linux.

While others have their turn, the whole group is stopped (SIGSTOP): no thread pool that still spins,
no heartbeat, nothing. Should this program be killed, the kernel wakes stopped groups with SIGHUP,
because they lose their last tie to the session, and the others see the end of their input. What is
said over the pipes is not known here, except that it comes in lines.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from pipespec.errors import PipeSpecError
from pipespec.interrupts import hold_interrupts

_MAX_LINE_BYTES: Final = 1 << 26
_READ_BYTES: Final = 1 << 16
_TAIL_BYTES: Final = 1 << 14
_POLL_S: Final = 0.01
_REAP_TIMEOUT_S: Final = 10.0  # of what was killed


class ContestantFailed(PipeSpecError):
    """A contestant cannot run here, or no longer; the race goes on without it. The text is a clause
    that follows its name."""


class Group:
    """One contestant's processes. What they write to stderr goes to the log.

    A context manager; whoever holds it enters it before `start`, so that nothing that strikes in
    between can leave a process that is nobody's.
    """

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: list[bytes] = []
        self._rest = b""

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int] = ()
    ) -> None:
        """Starts the leader of the group. environment: in place of ours. cores: it may use these
        alone, from its first instruction on; empty leaves it free.

        Raises:
            ContestantFailed: there is no such program.
        """
        assert self._process is None, "a group starts once"
        try:
            with hold_interrupts(), _on_cores(cores), self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=dict(environment),
                    bufsize=0,
                    process_group=0,
                )
        except OSError as error:
            reason = error.strerror or error
            raise ContestantFailed(f"{command[0]} cannot be started: {reason}") from error
        os.set_blocking(self._input, False)

    @property
    def is_started(self) -> bool:
        """Whether there is a process, perhaps one that has ended; not before `start` and not after
        `close`."""
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, line: bytes, timeout_s: float) -> None:
        """Writes a line.

        Raises:
            ContestantFailed: the process has ended, or does not read.
        """
        deadline = time.monotonic() + timeout_s
        rest = memoryview(line + b"\n")
        while rest:
            ready = select.select([], [self._input], [], max(0.0, deadline - time.monotonic()))[1]
            if not ready:
                raise ContestantFailed(f"did not read for {timeout_s:g} s; see --timeout")
            try:
                rest = rest[os.write(self._input, rest) :]
            except BrokenPipeError as error:
                raise ContestantFailed(self.describe_end()) from error

    def read(self, timeout_s: float) -> bytes | None:
        """The next line, without its end; None after the last one.

        Raises:
            ContestantFailed: it did not come in time, or has no end.
        """
        deadline = time.monotonic() + timeout_s
        while not self._lines:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._output], [], [], left_s)[0]:
                raise ContestantFailed(f"was silent for {timeout_s:g} s; see --timeout")
            data = os.read(self._output, _READ_BYTES)
            if not data:
                rest, self._rest = self._rest, b""
                return rest or None
            *self._lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _MAX_LINE_BYTES:
                raise ContestantFailed("wrote a line without an end")
        return self._lines.pop(0)

    def pause(self) -> None:
        """Stops every process of the group; `resume` lets them go on."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end_input(self) -> None:
        """Lets the process see the end of its input, which tells ours to close everything."""
        self._signal(signal.SIGCONT)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, timeout_s: float) -> int | None:
        """The leader's exit status, negative for a signal; None if it has not ended by then. It is
        not reaped yet: as long as it is not, the number of the group is its own."""
        deadline = time.monotonic() + timeout_s
        while True:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            ended = os.waitid(os.P_PID, self.pid, options)
            if ended is not None:
                is_exit = ended.si_code == os.CLD_EXITED
                return ended.si_status if is_exit else -ended.si_status
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Ends what is left of the group. Idempotent."""
        process = self._process
        if process is None:
            return
        with hold_interrupts():
            self._signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_TIMEOUT_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def describe_end(self) -> str:
        """How the process ended, in a clause, with the last line of its log."""
        code = self.wait(2.0)
        if code is None:
            how = "closed its output without ending"
        elif code >= 0:
            how = f"ended with exit status {code}"
        else:
            hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            how = f"was killed by signal {-code}{hint}"
        last = self.last_log_line()
        return f"{how}: {last}" if last else how

    def last_log_line(self) -> str:
        """The last line that is not empty; empty if there is none."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]

    @property
    def _input(self) -> int:
        assert self._process is not None and self._process.stdin is not None
        return self._process.stdin.fileno()

    @property
    def _output(self) -> int:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group; it lives as long as any of its processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """What is started within it begins on `cores`."""
    before = os.sched_getaffinity(0)
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, before)
