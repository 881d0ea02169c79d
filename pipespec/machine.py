"""What this machine has: the cores, memory and GPUs that this process may use.

It reads the operating system and NVML, never torch: a question about a GPU must not open a CUDA
context. Whatever cannot be read is taken as absent; nothing here raises.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Final

_GIB: Final = 1 << 30
_SYSFS: Final = Path("/sys")


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to place on. cores: the ids this process may run on, one of each physical core
    before their siblings. gpu_ids: what CUDA_VISIBLE_DEVICES would call each GPU; gpu_memory_gib
    and gpu_uuids: their sizes and their full UUIDs, in the same order."""

    cores: tuple[int, ...]
    memory_gib: float
    gpu_ids: tuple[str, ...] = ()
    gpu_memory_gib: tuple[float, ...] = ()
    gpu_uuids: tuple[str, ...] = ()


def this_machine(environ: Mapping[str, str], sysfs: Path = _SYSFS) -> Machine:
    """The machine as this process sees it.

    Respects its CPU affinity, its control group's limits and CUDA_VISIBLE_DEVICES (numbers, UUIDs
    and their prefixes, MIG instances; empty means none). No NVIDIA driver: no GPUs.
    """
    gpus = _visible_gpus(environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        cores=_cores(sysfs),
        memory_gib=_memory_gib(sysfs),
        gpu_ids=tuple(name for name, _, _ in gpus),
        gpu_memory_gib=tuple(gib for _, _, gib in gpus),
        gpu_uuids=tuple(uuid for _, uuid, _ in gpus),
    )


def _cores(sysfs: Path) -> tuple[int, ...]:
    """Usable core ids, one thread of each physical core first, cut to the control group's quota."""
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
    else:
        allowed = list(range(os.cpu_count() or 1))
    seen: set[int] = set()
    first: list[int] = []
    siblings: list[int] = []
    for core in allowed:
        (siblings if core in seen else first).append(core)
        topology = sysfs / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        seen.update(_parse_cpu_list(_read(topology)))
    quota, _, period = _read(sysfs / "fs/cgroup/cpu.max").partition(" ")
    limit = len(allowed)
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        limit = max(1, ceil(int(quota) / int(period)))
    return tuple([*first, *siblings][:limit])


def _parse_cpu_list(text: str) -> list[int]:
    """The numbers in the kernel's form, such as "0,8" or "0-1"."""
    numbers: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        if low.isdigit() and (not high or high.isdigit()):
            numbers.extend(range(int(low), int(high or low) + 1))
    return numbers


def _memory_gib(sysfs: Path) -> float:
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _read(sysfs / "fs/cgroup/memory.max")
    if limit.isdigit():
        total = min(total, int(limit))
    return total / _GIB


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _visible_gpus(visible: str | None) -> list[tuple[str, str, float]]:
    """CUDA's name, UUID and memory in GiB of each GPU that a CUDA process started now would see."""
    if visible is not None and not visible.strip():
        return []
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return _select(visible, _all_gpus(pynvml))
    except pynvml.NVMLError:
        return []
    finally:
        _quietly_shut_down(pynvml)


def _quietly_shut_down(nvml: Any) -> None:
    try:
        nvml.nvmlShutdown()
    except nvml.NVMLError:
        return


def _all_gpus(nvml: Any) -> list[tuple[str, str, float]]:
    """Number (empty for a MIG instance), UUID and memory in GiB of every GPU of the machine."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    # CUDA numbers by speed, NVML by bus: only where all are alike do they surely mean the same.
    alike = len({_text(nvml.nvmlDeviceGetName(handle)) for handle in handles}) == 1
    gpus = []
    for index, handle in enumerate(handles):
        instances = _mig_instances(nvml, handle)
        for part in instances or [handle]:
            number = str(index) if alike and not instances else ""
            memory_gib = nvml.nvmlDeviceGetMemoryInfo(part).total / _GIB
            gpus.append((number, _text(nvml.nvmlDeviceGetUUID(part)), memory_gib))
    return gpus


def _mig_instances(nvml: Any, handle: Any) -> list[Any]:
    """The MIG instances of a GPU; empty where MIG is off or unknown to GPU and driver."""
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:
        return []
    instances = []
    for index in range(count):
        try:
            instances.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        except nvml.NVMLError:
            continue  # a slot without an instance
    return instances


def _select(
    visible: str | None, gpus: Sequence[tuple[str, str, float]]
) -> list[tuple[str, str, float]]:
    """What CUDA_VISIBLE_DEVICES leaves of them, in its order; CUDA stops at a name that it does
    not know, and so does this."""
    if visible is None:
        return [(number or uuid, uuid, gib) for number, uuid, gib in gpus]
    chosen: list[tuple[str, str, float]] = []
    for name in (part.strip() for part in visible.split(",")):
        if name.isdigit():
            found = [gpus[int(name)]] if int(name) < len(gpus) else []
        else:
            found = [gpu for gpu in gpus if name and gpu[1].startswith(name)]
        if len(found) != 1:
            break
        chosen.append((name, *found[0][1:]))
    return chosen


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
