"""The form of a reading: what a source gives for each device, and what a result file stores.

A reading has one list for each quantity, with one item for each device. The first three names are
the original's, which knew only GPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Protocol

Values = Mapping[str, float | None]  # of one device, by the names in `DIGITS`
Reading = dict[str, Any]

ENERGY: Final = "energies_j"
POWER: Final = "gpu_powers"
ALWAYS: Final = ("gpu_utilizations", "gpu_memories", POWER)  # in every reading
# Decimals that are stored; what a device tells is no finer.
DIGITS: Final[Mapping[str, int]] = {
    "gpu_utilizations": 1,  # %: of a GPU, or of the cores that a process was given
    "gpu_memories": 2,  # %: in use on a GPU, or resident in a process
    POWER: 2,  # W
    ENERGY: 3,  # J since the first reading, by the device's own counter
    "memory_used_mib": 1,
    "temperatures_c": 0,
    "sm_clocks_mhz": 0,
    "memory_clocks_mhz": 0,
    "core_utilizations": 1,  # %: of a process's cores, by whomever, in the last second
}
TIME_DIGITS: Final = 4
SLOW_S: Final = 1.0  # between two looks at what changes slowly: looking costs CPU time


class Source(Protocol):
    """A kind of device. facts: of each device, for the metadata of a result file."""

    facts: Sequence[Mapping[str, Any]]

    def read(self, now_s: float) -> list[Values]:
        """One map a device, in the order of `facts`. A quantity that cannot be read is missing or
        None; nothing is raised for it."""
        ...

    def close(self) -> None: ...


def to_reading(now_s: float, values: Sequence[Values], names: Collection[str]) -> Reading:
    """`values` of all devices as lists, of the quantities `names`."""
    reading: Reading = {"timestamp": now_s}
    for name, digits in DIGITS.items():
        if name in names:
            found = (device.get(name) for device in values)
            reading[name] = [None if v is None else round(v, digits or None) for v in found]
    return reading
