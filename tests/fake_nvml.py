"""A pretended NVML: a module object with GPUs that can be read, refuse an answer, or get lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class FakeNvmlError(Exception):
    pass


class FakeNvml(SimpleNamespace):
    """NVML with GPUs given as (name, GiB), MIG off except on those in `mig`.

    GPU i is 10 * i % busy, holds i GiB, draws 100 + i W, and has drawn 1000 J more at each look at
    its counter. lost: these answer nothing. without: names of functions that no GPU has.
    """

    NVMLError = FakeNvmlError
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2

    def __init__(
        self, *gpus: tuple[str, int], mig: tuple[int, ...] = (), without: tuple[str, ...] = ()
    ) -> None:
        super().__init__(gpus=gpus, mig=mig, without=without, num_open=0)
        self.lost: set[int] = set()
        self.num_calls: dict[str, int] = {}
        self.energies_mj = [0] * len(gpus)

    def nvmlInit(self) -> None:  # noqa: N802
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        for index in range(len(self.gpus)):
            if self.nvmlDeviceGetUUID(index) == uuid and index not in self.lost:
                return index
        raise FakeNvmlError("not found")

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return str(self.gpus[handle][0])

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return f"MIG-{handle}" if isinstance(handle, str) else f"GPU-{'abcdefgh'[handle] * 4}"

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> SimpleNamespace:  # noqa: N802
        self._check("nvmlDeviceGetMemoryInfo", handle)
        if isinstance(handle, str):
            return SimpleNamespace(total=10 << 30, used=1 << 30)
        return SimpleNamespace(total=self.gpus[handle][1] << 30, used=handle << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        self._check("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=10 * handle, memory=0)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        self._check("nvmlDeviceGetPowerUsage", handle)
        return 1000 * (100 + handle)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        self._check("nvmlDeviceGetTotalEnergyConsumption", handle)
        self.energies_mj[handle] += 1_000_000
        return self.energies_mj[handle]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        self._check("nvmlDeviceGetTemperature", handle)
        return 40 + handle

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:  # noqa: N802
        self._check("nvmlDeviceGetClockInfo", handle)
        return 1980 if clock == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:  # noqa: N802
        if handle not in self.mig:
            raise FakeNvmlError("not supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:  # noqa: N802
        return 3

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int) -> str:  # noqa: N802
        if index == 2:
            raise FakeNvmlError("no such instance")
        return f"{handle}-{index}"

    def _check(self, function: str, handle: Any) -> None:
        self.num_calls[function] = self.num_calls.get(function, 0) + 1
        if function in self.without or handle in self.lost:
            raise FakeNvmlError(f"{function} of GPU {handle}")
