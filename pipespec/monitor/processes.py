"""The processes of stages that run on the CPU, and the cores that they were given. Linux.

A process's CPU time is read from its CPU-time clock, which is exact to the nanosecond; the times in
/proc, which psutil reports, come in ticks of 10 ms, a tenth of the usual interval.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipespec.monitor.readings import SLOW_S, Values

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Watched:
    """A stage's process. pid: None where it does not run now. cores: it is pinned to these; empty
    leaves it free. num_cores: that it may keep busy, which is 100 %."""

    name: str
    pid: int | None
    cores: tuple[int, ...] = ()
    num_cores: int = 1


class ProcessSource:
    """One device a stage: the share of its cores that its process uses, and its resident memory.

    Stages may share a process; each of them then has all of its values.
    """

    def __init__(self, watched: Sequence[Watched], proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._page_mib = os.sysconf("SC_PAGE_SIZE") / _MIB
        self._total_mib = self._page_mib * os.sysconf("SC_PHYS_PAGES")
        self._cores = _Cores(proc / "stat", {core for each in watched for core in each.cores})
        self._watched: tuple[Watched, ...] = ()
        self.facts: Sequence[Mapping[str, Any]] = ()
        self.watch(watched)

    def watch(self, watched: Sequence[Watched]) -> None:
        """Other processes of the same stages, from now on."""
        assert not self._watched or len(watched) == len(self._watched)
        self._watched = tuple(watched)
        self._before: dict[int, tuple[float, float]] = {}  # by pid: when, and its CPU time
        self._resident_mib: dict[int, float | None] = {}
        self._resident_at_s = float("-inf")
        self.facts = [
            {
                "kind": "process",
                "name": each.name,
                "cores": list(each.cores),
                "num_cores": each.num_cores,
                "memory_total_mib": round(self._total_mib),
            }
            for each in watched
        ]

    def read(self, now_s: float) -> list[Values]:
        pids = {each.pid for each in self._watched if each.pid is not None}
        used = {pid: self._cores_used(pid) for pid in pids}
        if now_s - self._resident_at_s >= SLOW_S:
            self._resident_at_s = now_s
            self._resident_mib = {pid: self._read_resident_mib(pid) for pid in pids}
        busy = self._cores.read(now_s)
        return [self._values(each, used.get(each.pid or 0), busy) for each in self._watched]

    def close(self) -> None:
        pass

    def _values(self, each: Watched, num_used: float | None, busy: Mapping[int, float]) -> Values:
        """num_used: the cores that its process kept busy; None if there is none."""
        if each.pid is None or num_used is None:
            return {}
        values: dict[str, float | None] = {}
        values["gpu_utilizations"] = 100 * min(num_used / each.num_cores, 1.0)
        rss_mib = self._resident_mib.get(each.pid)
        if rss_mib is not None:
            values["memory_used_mib"] = rss_mib
            values["gpu_memories"] = 100 * rss_mib / self._total_mib
        if each.cores and all(core in busy for core in each.cores):
            values["core_utilizations"] = sum(busy[core] for core in each.cores) / len(each.cores)
        return values

    def _cores_used(self, pid: int) -> float | None:
        """How many cores the process kept busy since the last reading, the first time 0; None if
        it has ended."""
        try:
            now = time.perf_counter(), time.clock_gettime(_cpu_clock(pid))
        except OSError:
            return None
        before, self._before[pid] = self._before.get(pid, now), now
        return (now[1] - before[1]) / max(now[0] - before[0], 1e-9)

    def _read_resident_mib(self, pid: int) -> float | None:
        try:
            pages = (self._proc / str(pid) / "statm").read_text(encoding="ascii").split()
        except OSError:  # it has ended
            return None
        return int(pages[1]) * self._page_mib


class _Cores:
    """How busy single cores are, with whatever."""

    def __init__(self, stat: Path, cores: set[int]) -> None:
        self._stat = stat
        self._wanted = {f"cpu{core}": core for core in cores}
        self._at_s = float("-inf")
        self._times: dict[int, tuple[int, int]] = {}  # in all, and idle
        self._busy: dict[int, float] = {}

    def read(self, now_s: float) -> Mapping[int, float]:
        """Percent of about the last second."""
        if not self._wanted or now_s - self._at_s < SLOW_S:
            return self._busy
        before, self._at_s = self._times, now_s
        self._times = self._read_times()
        self._busy = {}
        for core, (total, idle) in self._times.items():
            total_before, idle_before = before.get(core, (total, idle))
            if total > total_before:
                share = 1 - (idle - idle_before) / (total - total_before)
                self._busy[core] = 100 * min(max(share, 0.0), 1.0)
        return self._busy

    def _read_times(self) -> dict[int, tuple[int, int]]:
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
        except OSError:
            return {}
        times = {}
        for line in lines:
            name, *ticks = line.split()
            if name in self._wanted:
                # user nice system idle iowait irq softirq steal; what follows is part of user
                numbers = [int(tick) for tick in ticks[:8]]
                times[self._wanted[name]] = sum(numbers), numbers[3] + numbers[4]
        return times


def _cpu_clock(pid: int) -> int:
    """What clock_getcpuclockid(3) gives for another process: Linux encodes the pid in it."""
    return (~pid << 3) | 2
