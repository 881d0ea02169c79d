"""A run's monitor: which devices its stages are on, and what is recorded of them for each sample.

The order of the devices is the same for all samples of a run, also where stages are left out or
processes replaced: the GPUs that the command may use, as `cuda:N` counts them, if a stage is on
one; then a process for each stage that is on none; then the processor's packages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pipespec.commands.settings import AnyDecoder
from pipespec.decoding import AsyncChainSpeculativeDecoder, Hierarchy
from pipespec.errors import UsageError
from pipespec.gpu_monitor import SAMPLER, GPUMonitor
from pipespec.metrics import device_metrics
from pipespec.monitor.processes import Watched


def check_interval(interval_s: float) -> None:
    """Whether `--monitor-interval` can be that.

    Raises:
        UsageError: it cannot.
    """
    if not (math.isfinite(interval_s) and interval_s >= 0):
        raise UsageError(
            f"--monitor-interval is {interval_s:g}; it must be a number of seconds above 0, or 0 "
            "for no monitor"
        )


class RunMonitor:
    """The monitor of one strategy's run, a context manager. It starts with the first models; with
    an interval of 0 there is none, and nothing is recorded.

    Its stages are all that the strategy has, of which some may be left out later. command: see
    `GPUMonitor`.
    """

    def __init__(
        self,
        interval_s: float,
        hierarchy: Hierarchy,
        strategy: str,
        command: Sequence[str] = SAMPLER,
    ) -> None:
        self._hierarchy = hierarchy
        self._strategy = strategy
        stages = tuple(range(len(hierarchy.models)))
        self._stages = stages[-1:] if strategy == "greedy" else stages
        self._running: tuple[int, ...] = ()
        self._gpus = {stage: _gpu_indexes(hierarchy, stage) for stage in stages}
        self._by_process = [stage for stage in self._stages if not self._gpus[stage]]
        machine = hierarchy.machine
        on_gpus = len(self._by_process) < len(self._stages)
        self._num_gpus = len(machine.gpu_uuids) if on_gpus else 0
        self._monitor: GPUMonitor | None = None
        if interval_s > 0:
            self._monitor = GPUMonitor(
                interval_s,
                gpus=machine.gpu_uuids[: self._num_gpus],
                watched=self._watched({}),
                command=command,
            )

    def follow(self, stages: Sequence[int], decoder: AnyDecoder) -> None:
        """From now on these stages run, in the decoder's processes."""
        self._running = tuple(stages)
        if self._monitor is not None:
            self._monitor.start()
            pids = pids_of(decoder)
            by_stage = dict(zip(stages, pids if len(pids) > 1 else pids * len(stages)))
            self._monitor.watch(self._watched(by_stage))

    def begin(self) -> None:
        """A sample is about to be written."""
        if self._monitor is not None:
            self._monitor.clear()

    def end(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The sample is written: its `gpustats`, and what they say for its metrics."""
        if self._monitor is None:
            return [], {}
        gpustats = self._monitor.get_results()
        stages = [self._devices(each) if each in self._running else () for each in self._stages]
        return gpustats, device_metrics(gpustats, stages, self._metered())

    def metadata(self, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a result file says of the monitor, as `{"monitor": ...}`; empty without one.

        earlier: what an earlier session of the same run said.
        """
        if self._monitor is None:
            return {}
        facts = self._monitor.facts
        facts["stages"] = [self._devices(stage) for stage in self._stages]
        if earlier is not None:
            last = {key: value for key, value in earlier.items() if key != "earlier"}
            facts["earlier"] = [*earlier.get("earlier", []), last]
        return {"monitor": facts}

    def close(self) -> None:
        """Ends the monitor. Idempotent."""
        if self._monitor is not None:
            self._monitor.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _devices(self, stage: int) -> tuple[int, ...]:
        """The indexes of a stage's devices."""
        return self._gpus[stage] or (self._num_gpus + self._by_process.index(stage),)

    def _metered(self) -> tuple[int, ...] | None:
        """The devices whose energy is the run's: the GPUs in use, and the packages if a stage runs
        on the CPU; None if it does and there is no meter."""
        assert self._monitor is not None
        on_cpu = any(not self._gpus[stage] for stage in self._running)
        devices = self._monitor.facts["devices"]
        packages = [i for i, device in enumerate(devices) if device["kind"] == "cpu-package"]
        if on_cpu and not packages:
            return None
        gpus = {gpu for stage in self._running for gpu in self._gpus[stage]}
        return (*sorted(gpus), *(packages if on_cpu else ()))

    def _watched(self, pids: Mapping[int, int]) -> list[Watched]:
        """The stages that are on no GPU, and the process of each that runs."""
        models, placements = self._hierarchy.models, self._hierarchy.placements
        watched = []
        for stage in self._by_process:
            # Strategies of one process have the target's cores for all of their stages.
            place = placements[stage if self._strategy == "async-chain" else -1]
            num_cores = len(place.cores) or place.threads
            watched.append(Watched(models[stage].name, pids.get(stage), place.cores, num_cores))
        return watched


def pids_of(decoder: AnyDecoder) -> list[int]:
    """The processes that hold the models: one, or one for each."""
    if isinstance(decoder, AsyncChainSpeculativeDecoder):
        return list(decoder.pipeline.pids)
    return [os.getpid()]


def _gpu_indexes(hierarchy: Hierarchy, stage: int) -> tuple[int, ...]:
    """The GPUs of a stage, as `cuda:N` counts them; none for one without weights, which only
    sleeps."""
    if hierarchy.models[stage].emulated is not None:
        return ()
    machine = hierarchy.machine
    names = hierarchy.placements[stage].visible_devices
    return tuple(machine.gpu_ids.index(name) for name in names)
