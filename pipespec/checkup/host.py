"""Cores, their clocks and siblings, memory, and what else runs: whether timings can be trusted.

Reads the operating system; whatever cannot be read is left out. Starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Final

from pipespec.checkup.findings import Finding, Section, ok, warning
from pipespec.errors import UsageError
from pipespec.machine import Machine
from pipespec.results.environment import cpu_model
from pipespec.worker_spec import make_run_dir

_SYSFS: Final = Path("/sys")
_SHARED_MEMORY: Final = Path("/dev/shm")
_GIB: Final = 1 << 30
_BUSY_SAMPLE_S: Final = 0.5
_MUCH_LOAD: Final = 0.25  # of a core


def check_host(machine: Machine) -> Section:
    """The processor as this process may use it, and memory."""
    import psutil

    num_online = os.cpu_count() or 1
    findings = check_cores(machine.cores, num_online, _SYSFS)
    busy = sum(psutil.cpu_percent(_BUSY_SAMPLE_S, percpu=True)) / 100
    load = os.getloadavg()[0]
    findings.append(check_load(busy, load, num_online))
    available_gib = psutil.virtual_memory().available / _GIB
    findings.append(check_memory(available_gib, machine.memory_gib))
    findings += _folder_findings()
    values: dict[str, Any] = {
        "cpu": cpu_model(),
        "num_online": num_online,
        "cores": list(machine.cores),
        "busy_cores": round(busy, 2),
        "load_average": load,
        "memory_gib": round(machine.memory_gib, 2),
        "available_gib": round(available_gib, 2),
    }
    return Section("Host", [ok(cpu_model() or "processor unknown"), *findings], values)


def check_cores(cores: Sequence[int], num_online: int, sysfs: Path) -> list[Finding]:
    """Which cores, how many of them whole, and how they are clocked."""
    text = f"{_count(len(cores), 'core')} to use ({_ranges(cores)}) of {num_online}"
    quota = _quota(sysfs)
    if quota is not None:
        text += f"; the control group grants {quota:g}"
    findings = [ok(text)]
    if len(cores) < 2:
        findings.append(
            warning(
                "one core: stages take turns, and async-chain cannot overlap anything",
                "give the process more cores (taskset, the container's cpus)",
            )
        )
    if quota is not None and quota < ceil(quota):
        findings.append(
            warning(
                f"a quota of {quota:g} cores stops processes in the middle of a step",
                "ask for whole cores",
            )
        )
    num_physical = len({_siblings(sysfs, core) for core in cores})
    if num_physical < len(cores):
        findings.append(
            warning(
                f"the {len(cores)} cores are hyperthreads of {num_physical}: two stages on one "
                "share its arithmetic and caches",
                f"name at most {num_physical} of them in the models config (cpu:0 to "
                f"cpu:{num_physical - 1} are distinct)",
            )
        )
    governors = {_read(_cpu(sysfs, core) / "cpufreq/scaling_governor") for core in cores} - {""}
    slow = governors - {"performance", "schedutil"}
    if slow:
        findings.append(
            warning(
                f"clock governor {', '.join(sorted(slow))}: the first steps after a wait are slow",
                "sudo cpupower frequency-set -g performance",
            )
        )
    elif governors:
        findings.append(ok(f"clock governor {', '.join(sorted(governors))}"))
    return findings


def check_load(busy: float, load: float, num_online: int) -> Finding:
    """busy: cores at work in the last moment, this process asleep. load: the minute's average."""
    text = f"{busy:.1f} of {num_online} cores busy now, load {load:.1f}"
    if busy < _MUCH_LOAD:
        return ok(text)
    return warning(f"{text}: timings below are not the machine's own", "stop what else runs")


def check_memory(available_gib: float, total_gib: float) -> Finding:
    text = f"{available_gib:.1f} of {total_gib:.1f} GiB of memory available"
    if available_gib > max(1.0, 0.1 * total_gib):
        return ok(text)
    return warning(text, "free some: weights that are swapped out make any number meaningless")


def _folder_findings() -> list[Finding]:
    """Where sockets go, and shared memory, which libraries of several GPUs use."""
    findings = []
    try:
        run_dir = make_run_dir()
    except UsageError as error:
        findings.append(warning(f"no folder for ipc sockets: {error}", "set TMPDIR"))
    else:
        run_dir.rmdir()
        findings.append(ok(f"ipc sockets go to {run_dir.parent}, which is writable"))
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return findings
    size_gib = status.f_blocks * status.f_frsize / _GIB
    text = f"{size_gib:.1f} GiB of shared memory in {_SHARED_MEMORY}"
    if size_gib >= 1.0:
        return [*findings, ok(text)]
    remedy = "start the container with --shm-size 8g if a model is to span several GPUs"
    return [*findings, warning(text, remedy)]


def _quota(sysfs: Path) -> float | None:
    quota, _, period = _read(sysfs / "fs/cgroup/cpu.max").partition(" ")
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _siblings(sysfs: Path, core: int) -> str:
    return _read(_cpu(sysfs, core) / "topology/thread_siblings_list") or str(core)


def _cpu(sysfs: Path, core: int) -> Path:
    return sysfs / f"devices/system/cpu/cpu{core}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
