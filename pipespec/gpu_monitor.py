"""Samples utilization, memory, power and energy while a program runs, in a process of its own.

GPUs are asked through NVML; where a stage runs on the CPU, its process is looked at instead, and
the processor's power meter where it may be read. Whatever goes wrong with that (a GPU is lost, the
monitor's process is killed), the program goes on; what is not known is None. What a token is, and
which models run, is not known here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, Self

from pipespec.errors import PipeSpecError, UsageError
from pipespec.interrupts import hold_interrupts
from pipespec.monitor.processes import Watched
from pipespec.monitor.readings import TIME_DIGITS, Reading
from pipespec.stage_process import source_environment

log = logging.getLogger(__name__)

DEFAULT_INTERVAL_S: Final = 0.1
SAMPLER: Final = (sys.executable, "-m", "pipespec.monitor.sampler")
_START_S: Final = 30.0  # a driver that nobody uses takes seconds to wake up
_ANSWER_S: Final = 10.0
_END_S: Final = 2.0
_READ_BYTES: Final = 1 << 16


class GPUMonitor:
    """A context manager; entering it starts it. One thread uses it.

        with GPUMonitor() as monitor:
            work()
            stats = monitor.get_results()

    Args:
        interval_s: between two readings. They come less often where they would take more than 1 %
            of a core.
        gpus: UUIDs of the GPUs to look at, which fixes their order in all lists; None: all that
            NVML knows, and the processes only where there are none.
        watched: processes to look at, by default this one if `gpus` is None. They follow the GPUs
            in the lists, and the processor's packages, if their power can be read, follow them.
        command: what starts the sampler; this process's id is appended.

    Raises:
        UsageError: an interval that is none.
    """

    def __init__(
        self,
        interval_s: float = DEFAULT_INTERVAL_S,
        *,
        gpus: Sequence[str] | None = None,
        watched: Sequence[Watched] = (),
        command: Sequence[str] = SAMPLER,
    ) -> None:
        if not (math.isfinite(interval_s) and interval_s > 0):
            raise UsageError(f"the monitor's interval is {interval_s:g} s; it must be above 0")
        self.interval_s = interval_s
        self._gpus = None if gpus is None else list(gpus)
        own = Watched("this process", os.getpid(), num_cores=os.cpu_count() or 1)
        self._watched = list(watched) or ([own] if gpus is None else [])
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._last_pid: int | None = None
        self._rest = b""
        self._readings: list[Reading] = []
        self._origin_s = self._started_s = 0.0
        self._devices: list[dict[str, Any]] = []
        self._cost: dict[str, float] = {}
        self._errors: list[str] = []

    # -- the original's methods -------------------------------------------------------------

    def start(self) -> None:
        """Begins to sample, with a reading. Does nothing while it samples already."""
        if self._process is not None:
            return
        self._errors, self._started_s = [], time.monotonic()
        try:
            with hold_interrupts():  # a process that exists is in `_process`
                self._spawn()
        except OSError as error:
            self._lose(error)
        answer = self._ask(
            {
                "interval_s": self.interval_s,
                "gpus": self._gpus,
                "watched": [asdict(each) for each in self._watched],
            },
            _START_S,
        )
        if answer is None:
            return
        self._devices = answer["devices"]
        self._cost["start_cpu_s"] = round(answer["cpu_s"], 3)
        self.clear()

    def stop(self) -> None:
        """Ends the sampling, with a last reading; `get_results` keeps everything. Idempotent."""
        try:
            self._fetch()
        finally:
            self._end()

    def clear(self) -> None:
        """Forgets what was sampled. The time is 0 now, and a reading is taken just before."""
        self._begin({"do": "clear"})

    def get_results(self) -> list[Reading]:
        """All readings since `start` or `clear`, and while it samples, one that is taken now.

        Each has `timestamp` (s), and lists with an item for each device: `gpu_utilizations` (%),
        `gpu_memories` (%), `gpu_powers` (W), and those of the others in `monitor.readings` that
        some device knows. What a device does not know is None.
        """
        self._fetch()
        return [
            {**reading, "timestamp": round(reading["timestamp"] - self._origin_s, TIME_DIGITS)}
            for reading in self._readings
        ]

    # -- more than the original had ---------------------------------------------------------

    def watch(self, watched: Sequence[Watched]) -> None:
        """From now on these processes are looked at, in place of those before, one for one. What
        was sampled is forgotten."""
        assert len(watched) == len(self._watched)
        self._watched = list(watched)
        self._begin({"do": "watch", "watched": [asdict(each) for each in watched]})

    @property
    def pid(self) -> int | None:
        """Of the process that samples; None if there is none."""
        return None if self._process is None else self._process.pid

    @property
    def facts(self) -> dict[str, Any]:
        """For the metadata of a result file: source, interval, devices in the order of the lists,
        what went wrong, its process, and how many CPU seconds that took (start_cpu_s of them to
        start) of how many seconds."""
        kinds = {"gpu": "nvml", "process": "process", "cpu-package": "rapl"}
        sources = dict.fromkeys(kinds[device["kind"]] for device in self._devices)
        return {
            "source": "+".join(sources) or None,
            "interval_s": self.interval_s,
            "devices": self._devices,
            "errors": self._errors,
            "pid": self._last_pid,
            **self._cost,
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    # -- the process ------------------------------------------------------------------------

    def _spawn(self) -> None:
        self._rest = b""
        self._process = subprocess.Popen(
            [*self._command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **source_environment(os.environ)},
            bufsize=0,
        )
        self._last_pid = self._process.pid

    def _begin(self, command: dict[str, Any]) -> None:
        self._readings = []
        self._ask(command, _ANSWER_S)
        self._origin_s = time.perf_counter()

    def _fetch(self) -> None:
        """Brings over what was sampled."""
        answer = self._ask({"do": "take"}, _ANSWER_S)
        if answer is not None:
            self._readings += answer["readings"]

    def _ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """The answer to a command; None if there is no process, or none any more."""
        if self._process is None:
            return None
        try:
            self._write(json.dumps(command).encode() + b"\n", timeout_s)
            answer: dict[str, Any] = json.loads(self._read_line(timeout_s))
        except (OSError, ValueError, _Lost) as error:
            self._lose(error)
            return None
        except BaseException:  # Ctrl-C: the answer is still to come, and would be taken for another
            self._end()
            raise
        self._errors = answer["errors"]
        self._cost["cpu_s"] = round(answer["cpu_s"], 3)
        self._cost["wall_s"] = round(time.monotonic() - self._started_s, 3)
        return answer

    def _lose(self, error: Exception) -> None:
        """There is no process, or none that answers."""
        log.warning("the monitor is lost (%s); the run goes on without it", error)
        self._errors.append(f"the monitor was lost: {error}")
        self._end()

    def _write(self, line: bytes, timeout_s: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        if not select.select([], [descriptor], [], timeout_s)[1]:
            raise _Lost(f"it did not read for {timeout_s:g} s")
        os.write(descriptor, line)  # shorter than a pipe holds, so that it does not block

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor, deadline_s = self._process.stdout.fileno(), time.monotonic() + timeout_s
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([descriptor], [], [], left_s)[0]:
                raise _Lost(f"it did not answer for {timeout_s:g} s")
            data = os.read(descriptor, _READ_BYTES)
            if not data:
                raise _Lost("its process has ended")
            parts.append(data)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def _end(self) -> None:
        """Ends the process, gently if it is able to. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with hold_interrupts():
            process.stdin.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
            process.stdout.close()


class _Lost(PipeSpecError):
    """The process that samples does not answer."""
