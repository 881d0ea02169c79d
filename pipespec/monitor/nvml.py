"""GPUs, through NVML: never through CUDA, which would open a context on each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pipespec.monitor.readings import SLOW_S, Values

_MIB: Final = 1 << 20


class NvmlSource:
    """The GPUs with these UUIDs; None: all that NVML knows, in its order.

    A GPU that is lost, or was never there, has no values. What a GPU cannot tell at the start (a
    MIG instance has no utilization of its own) is not asked again. nvml: the module `pynvml`.

    Raises:
        Exception: what NVML raises if it cannot be used at all.
    """

    def __init__(self, nvml: Any, uuids: Sequence[str] | None = None) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        if uuids is None:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        else:
            handles = [self._try(nvml.nvmlDeviceGetHandleByUUID, uuid) for uuid in uuids]
        self._gpus = [_Gpu(self._try, nvml, handle) for handle in handles]
        self.facts: Sequence[Mapping[str, Any]] = [
            gpu.facts if uuids is None else {**gpu.facts, "uuid": uuids[index]}
            for index, gpu in enumerate(self._gpus)
        ]

    def read(self, now_s: float) -> list[Values]:
        return [gpu.read(now_s) for gpu in self._gpus]

    def close(self) -> None:
        self._try(self._nvml.nvmlShutdown)

    def _try(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What NVML answers; None if it has no answer."""
        with contextlib.suppress(self._nvml.NVMLError):
            return function(*arguments)
        return None


class _Gpu:
    """One GPU; handle None: it cannot be found."""

    def __init__(self, ask: Callable[..., Any], nvml: Any, handle: Any) -> None:
        self._ask = ask
        self._handle = handle
        self._fast = self._answered(
            (_utilization, nvml.nvmlDeviceGetUtilizationRates),
            (_memory, nvml.nvmlDeviceGetMemoryInfo),
            (_power, nvml.nvmlDeviceGetPowerUsage),
            (_energy, nvml.nvmlDeviceGetTotalEnergyConsumption),
        )
        self._slow = self._answered(
            (_temperature, nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            (_sm_clock, nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            (_memory_clock, nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        )
        self._slow_values: dict[str, float | None] = {}
        self._slow_at_s = float("-inf")
        memory = self._query(nvml.nvmlDeviceGetMemoryInfo)
        self.facts = {
            "kind": "gpu",
            "name": _text(self._query(nvml.nvmlDeviceGetName)),
            "uuid": _text(self._query(nvml.nvmlDeviceGetUUID)),
            "memory_total_mib": None if memory is None else round(memory.total / _MIB),
        }

    def read(self, now_s: float) -> Values:
        if now_s - self._slow_at_s >= SLOW_S:
            self._slow_at_s, self._slow_values = now_s, self._values(self._slow)
        return {**self._values(self._fast), **self._slow_values}

    def _answered(self, *queries: Any) -> list[Any]:
        """Those that the GPU answers now."""
        return [query for query in queries if self._query(*query[1:]) is not None]

    def _values(self, queries: Sequence[Any]) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for convert, function, *arguments in queries:
            answer = self._query(function, *arguments)
            if answer is not None:
                values.update(convert(answer))
        return values

    def _query(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return None if self._handle is None else self._ask(function, self._handle, *arguments)


def _utilization(rates: Any) -> dict[str, float]:
    return {"gpu_utilizations": rates.gpu}


def _memory(memory: Any) -> dict[str, float]:
    return {
        "gpu_memories": 100 * memory.used / memory.total,
        "memory_used_mib": memory.used / _MIB,
    }


def _power(milliwatts: float) -> dict[str, float]:
    return {"gpu_powers": milliwatts / 1000}


def _energy(millijoules: float) -> dict[str, float]:
    return {"energies_j": millijoules / 1000}


def _temperature(degrees: float) -> dict[str, float]:
    return {"temperatures_c": degrees}


def _sm_clock(megahertz: float) -> dict[str, float]:
    return {"sm_clocks_mhz": megahertz}


def _memory_clock(megahertz: float) -> dict[str, float]:
    return {"memory_clocks_mhz": megahertz}


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
