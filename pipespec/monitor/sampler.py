"""The monitor's process: `python -m pipespec.monitor.sampler PARENT_PID`.

Started by `gpu_monitor`, never by hand. Its first line of input says what to sample and how often;
after that it samples by the clock and answers one line at a time (see `serve`). It ends with its
input, and with its parent however that ended. Ctrl-C and the like are the parent's to act on.

It takes no more than 1 % of a core: where its readings cost more than that, those by the clock come
less often. Those that are asked for, around each text, always come.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pipespec.monitor.nvml import NvmlSource
from pipespec.monitor.packages import PackageSource
from pipespec.monitor.processes import ProcessSource, Watched
from pipespec.monitor.readings import ALWAYS, ENERGY, POWER, Reading, Source, Values, to_reading
from pipespec.parent_watch import end_with_parent

MAX_SHARE: Final = 0.01  # of a core
_MAX_ERRORS: Final = 10  # that are reported
Clock = Callable[[], float]


class Sampler:
    """Readings of some sources, now and then, kept until they are taken.

    interval_s: between two of them, or more if that would cost too much. clock, cpu_clock: seconds;
    the first is the one that timestamps are of, the second this process's CPU time.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        interval_s: float,
        clock: Clock = time.perf_counter,
        cpu_clock: Clock = time.process_time,
    ) -> None:
        self._sources = sources
        self._interval_s = interval_s
        self._clock, self._cpu_clock = clock, cpu_clock
        self._names = set(ALWAYS)
        self._first_values: Sequence[Values] = []
        self._readings: list[Reading] = []
        self._begun_s, self._begun_cpu_s = clock(), cpu_clock()
        self._due_s = self._begun_s
        self.errors: list[str] = []
        self.clear()

    @property
    def facts(self) -> list[dict[str, Any]]:
        """Of each device. energy: what says how much it took, "counter" or "power", or None."""
        facts = [fact for source in self._sources for fact in source.facts]
        return [{**fact, "energy": self._meter(place)} for place, fact in enumerate(facts)]

    @property
    def is_due(self) -> bool:
        return self.due_in_s <= 0

    @property
    def due_in_s(self) -> float:
        return self._due_s - self._clock()

    def clear(self) -> None:
        """Forgets what was sampled, and begins anew with a reading."""
        self._first_values, self._readings = [], []
        self.sample()

    def take(self) -> list[Reading]:
        """All readings since the last time, one that is taken now included."""
        self.sample()
        readings, self._readings = self._readings, []
        return readings

    def sample(self) -> None:
        """One reading."""
        start_s = self._clock()
        values = [device for source in self._sources for device in self._read(source, start_s)]
        self._names |= {name for device in values for name, v in device.items() if v is not None}
        self._readings.append(to_reading(start_s, self._since_first(values), self._names))
        affordable_s = self._begun_s + (self._cpu_clock() - self._begun_cpu_s) / MAX_SHARE
        self._due_s = max(start_s + self._interval_s, affordable_s)

    def _read(self, source: Source, now_s: float) -> Sequence[Values]:
        try:
            return source.read(now_s)
        except Exception as error:  # of a driver: the others go on, and so does the run
            self.report(error)
            return [{} for _ in source.facts]

    def report(self, error: Exception) -> None:
        """Remembers an error, for the metadata."""
        text = f"{type(error).__name__}: {error}"
        if text not in self.errors and len(self.errors) < _MAX_ERRORS:
            self.errors.append(text)

    def _since_first(self, values: Sequence[Values]) -> list[Values]:
        """With energies from the first reading on."""
        if not self._first_values:
            self._first_values = values
        return [
            {**device, ENERGY: _difference(device.get(ENERGY), first.get(ENERGY))}
            for device, first in zip(values, self._first_values)
        ]

    def _meter(self, place: int) -> str | None:
        for name, meter in ((ENERGY, "counter"), (POWER, "power")):
            if self._first_values[place].get(name) is not None:
                return meter
        return None


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before


def open_sources(
    gpus: Sequence[str] | None, watched: Sequence[Watched], nvml: Callable[[], Any]
) -> tuple[list[Source], list[Exception]]:
    """Sources for these GPUs and processes, in this order, and for the packages where there are
    processes. gpus None: all GPUs, and the processes only where there are none.

    nvml: gives the module. What could not be opened is in the second value.
    """
    sources: list[Source] = []
    errors: list[Exception] = []
    if gpus is None or gpus:
        try:
            sources.append(NvmlSource(nvml(), gpus))
        except Exception as error:  # no module, no driver, or one that does not answer
            if gpus is not None:
                errors.append(error)
                sources.append(_Absent(gpus))
    if watched and not (gpus is None and sources and sources[0].facts):
        sources += [ProcessSource(watched), PackageSource()]
    return sources, errors


class _Absent:
    """GPUs of which nothing can be known."""

    def __init__(self, uuids: Sequence[str]) -> None:
        self.facts: Sequence[Mapping[str, Any]] = [
            {"kind": "gpu", "name": None, "uuid": uuid} for uuid in uuids
        ]

    def read(self, _now_s: float) -> list[Values]:
        return [{} for _ in self.facts]

    def close(self) -> None:
        pass


def _import_nvml() -> Any:
    import pynvml

    return pynvml


def serve(commands: int, answers: int, nvml: Callable[[], Any] = _import_nvml) -> None:
    """Reads lines of JSON from one descriptor and answers each on the other, until the first ends.

    The first is {"interval_s", "gpus": [UUID] or null, "watched": [fields of `Watched`]}. Then
    {"do": "clear" | "take"} or {"do": "watch", "watched": ...}. An answer has "readings", of take,
    "devices", "errors" and "cpu_s", what this process has used.
    """
    lines = _Lines(commands)
    first = lines.read(None)
    if first is None:
        return
    gpus, watched = first["gpus"], [Watched(**each) for each in first["watched"]]
    sources, errors = open_sources(gpus, watched, nvml)
    sampler = Sampler(sources, first["interval_s"])
    for error in errors:
        sampler.report(error)
    devices = sampler.facts
    _answer(answers, sampler, devices=devices)
    try:
        while not lines.is_at_end:
            command = lines.read(max(0.0, sampler.due_in_s))
            if command is not None:
                _answer(answers, sampler, readings=_do(command, sampler, sources))
            if sampler.is_due:
                sampler.sample()
    finally:
        for source in sources:
            source.close()


def _do(command: Mapping[str, Any], sampler: Sampler, sources: Sequence[Source]) -> list[Reading]:
    if command["do"] == "take":
        return sampler.take()
    if command["do"] == "watch":
        watched = [Watched(**each) for each in command["watched"]]
        for source in sources:
            if isinstance(source, ProcessSource):
                source.watch(watched)
    sampler.clear()
    return []


def _answer(descriptor: int, sampler: Sampler, **values: Any) -> None:
    answer = {**values, "errors": sampler.errors, "cpu_s": time.process_time()}
    rest = memoryview(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class _Lines:
    """Lines of JSON from a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self.is_at_end = False

    def read(self, timeout_s: float | None) -> Any:
        """The next one; None if it did not come in time, or not at all."""
        while b"\n" not in self._rest:
            if not select.select([self._descriptor], [], [], timeout_s)[0]:
                return None
            data = os.read(self._descriptor, 1 << 16)
            if not data:
                self.is_at_end = True
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def main(arguments: Sequence[str], nvml: Callable[[], Any] = _import_nvml) -> int:
    """Serves standard input and output."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(int(arguments[0]))
    try:
        serve(sys.stdin.fileno(), sys.stdout.fileno(), nvml)
    except BrokenPipeError:  # the parent does not want to know any more
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
