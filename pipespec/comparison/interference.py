"""How much of the race's cores others took during a turn: a busy machine spoils a race, and its
reader must know. Reads /proc, twice a turn; where there is none, nothing is known.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

_STAT: Final = Path("/proc/stat")
_WINDOW_S: Final = 0.3
_BUSY_FIELDS: Final = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal


class CoreWatch:
    """From its making until it is asked. own_cpu_s: the processor time that the contestant has
    used so far, in seconds."""

    def __init__(self, cores: Sequence[int], own_cpu_s: Callable[[], float]) -> None:
        self._cores = cores
        self._own_cpu_s = own_cpu_s
        self._started_s = time.monotonic()
        self._busy_before_s = busy_s(cores)
        self._own_before_s = own_cpu_s()

    def foreign_cores(self) -> float | None:
        """The number of cores that were busy on average with what was not the contestant's."""
        busy_after_s = busy_s(self._cores)
        if busy_after_s is None or self._busy_before_s is None:
            return None
        elapsed_s = time.monotonic() - self._started_s
        own_s = self._own_cpu_s() - self._own_before_s
        return max(0.0, busy_after_s - self._busy_before_s - own_s) / max(elapsed_s, 1e-9)


def await_calm(cores: Sequence[int], most_foreign_cores: float, timeout_s: float) -> None:
    """Returns when others leave `cores` alone for a moment, at the latest after `timeout_s`; to be
    called while no contestant is at work."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        watch = CoreWatch(cores, lambda: 0.0)
        time.sleep(_WINDOW_S)
        foreign = watch.foreign_cores()
        if foreign is None or foreign <= most_foreign_cores:
            return


def busy_s(cores: Sequence[int], stat: Path = _STAT) -> float | None:
    """Seconds since the start of the machine that `cores` were not idle, together; None if the
    system does not tell."""
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    wanted = {f"cpu{core}" for core in cores}
    total = 0
    for name, *fields in map(str.split, lines):
        if name in wanted:
            total += sum(int(fields[i]) for i in _BUSY_FIELDS if i < len(fields))
    return total / ticks


def group_cpu_s(leader_pid: int) -> float:
    """Processor seconds that a process, those it has started and those that ended have used."""
    import psutil

    total = 0.0
    try:
        leader = psutil.Process(leader_pid)
        for process in (leader, *leader.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    except psutil.NoSuchProcess:
        return total
    return total


def ended_children_cpu_s() -> float:
    """Processor seconds of all processes of ours that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
