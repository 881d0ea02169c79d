"""Where each stage runs: a pure function from a models config and a machine to placements.

It opens no device; `this_machine` (below) is the only function here that looks at one, and every
other one can be tested for eight GPUs on a laptop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to place on. cores: the ids this process may run on. gpu_ids: what
    CUDA_VISIBLE_DEVICES would call each GPU; gpu_memory_gib: their sizes, in the same order."""

    cores: tuple[int, ...]
    memory_gib: float
    gpu_ids: tuple[str, ...] = ()
    gpu_memory_gib: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StagePlacement:
    """Where one stage runs.

    device: what the runner is told inside its process: "cpu", "cuda:0", or "auto" (spread over all
    that the process sees). visible_devices: the process's CUDA_VISIBLE_DEVICES, empty for a CPU
    stage. cores: the process is pinned to these; empty leaves it free. threads: torch threads.
    max_memory_gib: device index inside the process, or "cpu" -> limit, for device "auto".
    """

    device: str
    visible_devices: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    threads: int = 1
    max_memory_gib: Mapping[str, float] = field(default_factory=dict)
