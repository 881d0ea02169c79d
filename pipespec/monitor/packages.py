"""Processor packages, with the power meter of Intel and AMD (RAPL), where its counters may be read.

They count for the whole machine: whatever else runs is in them. Usually only root may read them
(CVE-2020-8694).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipespec.monitor.readings import Values

POWERCAP: Final = Path("/sys/class/powercap")
_LEAST_S: Final = 0.005  # for a power; the counters move about every millisecond


class PackageSource:
    """Every package whose energy counter can be read now; none is the usual case."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        found = (_Package.open(zone) for zone in sorted(powercap.glob("intel-rapl:*")))
        self._packages = [package for package in found if package is not None]
        self.facts: Sequence[Mapping[str, Any]] = [
            {"kind": "cpu-package", "name": package.name} for package in self._packages
        ]

    def read(self, now_s: float) -> list[Values]:
        return [package.read(now_s) for package in self._packages]

    def close(self) -> None:
        pass


class _Package:
    """One package. Its counter starts over at a limit, which is added here."""

    def __init__(self, zone: Path, name: str, range_j: float, energy_j: float) -> None:
        self.name = name
        self._file = zone / "energy_uj"
        self._range_j = range_j
        self._counted_j = energy_j  # as it stands in the file
        self._total_j = 0.0
        self._before: tuple[float, float] | None = None  # when, and the total
        self._power_w: float | None = None

    @classmethod
    def open(cls, zone: Path) -> _Package | None:
        """A zone that is a package (there are others within it) and can be read."""
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
        except OSError:
            return None
        range_j, energy_j = _joules(zone / "max_energy_range_uj"), _joules(zone / "energy_uj")
        if not name.startswith("package") or energy_j is None or not range_j:
            return None
        return cls(zone, name, range_j, energy_j)

    def read(self, now_s: float) -> Values:
        counted_j = _joules(self._file)
        if counted_j is None:
            return {}
        self._total_j += (counted_j - self._counted_j) % self._range_j
        self._counted_j = counted_j
        if self._before is None:
            self._before = now_s, self._total_j
        elif now_s - self._before[0] >= _LEAST_S:
            self._power_w = (self._total_j - self._before[1]) / (now_s - self._before[0])
            self._before = now_s, self._total_j
        return {"energies_j": self._total_j, "gpu_powers": self._power_w}


def _joules(file: Path) -> float | None:
    try:
        return int(file.read_text(encoding="ascii")) / 1e6
    except (OSError, ValueError):
        return None
