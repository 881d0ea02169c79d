"""Energy and utilization of a sample, from what was read of the devices while it was written.

Readings are the items of `gpustats`: a timestamp in seconds and lists with an item for each device.
The first is taken just before the sample, the last just after it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Reading = Mapping[str, Any]


def device_metrics(
    gpustats: Sequence[Reading],
    stages: Sequence[Sequence[int]],
    metered: Sequence[int] | None,
) -> dict[str, Any]:
    """What belongs into the metrics of a sample.

    Args:
        stages: the devices of each stage; empty for one that did not run.
        metered: the devices that took all of the energy; None if those cannot be metered.

    Returns:
        energy_j: of all metered devices together, whatever else ran on them, or None.
        energy_per_stage_j: a stage's own, None where it shares a device or where that tells
            nothing.
        mean_utilization: percent, of each stage: the mean over its devices.
    """
    num_stages = Counter(device for devices in stages for device in devices)
    energies_j = [
        _sum([energy_j(gpustats, device) for device in devices])
        if all(num_stages[device] == 1 for device in devices)
        else None
        for devices in stages
    ]
    return {
        "energy_j": None if metered is None else _sum([energy_j(gpustats, d) for d in metered]),
        "energy_per_stage_j": energies_j,
        "mean_utilization": [
            _mean([mean_utilization(gpustats, device) for device in devices]) for devices in stages
        ],
    }


def energy_j(gpustats: Sequence[Reading], device: int) -> float | None:
    """Joules that a device took from the first reading to the last: by its counter, and where it
    has none the integral of its power, by the trapezoidal rule. None if either end is unknown."""
    counts_j = _series(gpustats, "energies_j", device)
    if any(count is not None for count in counts_j):
        return _difference(counts_j)
    powers_w = _series(gpustats, "gpu_powers", device)
    if len(powers_w) < 2 or powers_w[0] is None or powers_w[-1] is None:
        return None
    known: list[tuple[float, float]] = [
        (reading["timestamp"], power_w)
        for reading, power_w in zip(gpustats, powers_w)
        if power_w is not None
    ]
    return sum(
        (end_s - start_s) * (before_w + after_w) / 2
        for (start_s, before_w), (end_s, after_w) in itertools.pairwise(known)
    )


def mean_utilization(gpustats: Sequence[Reading], device: int) -> float | None:
    """Percent: each reading says what was since the one before it. None where nothing is known."""
    utilizations = _series(gpustats, "gpu_utilizations", device)
    weighted = seconds = 0.0
    for before, reading, utilization in zip(gpustats, gpustats[1:], utilizations[1:]):
        if utilization is not None:
            duration_s = reading["timestamp"] - before["timestamp"]
            weighted += duration_s * utilization
            seconds += duration_s
    return weighted / seconds if seconds else None


def _series(gpustats: Sequence[Reading], name: str, device: int) -> list[float | None]:
    """A device's values; None where a reading has none of that name."""
    columns = (reading.get(name) for reading in gpustats)
    return [None if column is None else column[device] for column in columns]


def _difference(counts: Sequence[float | None]) -> float | None:
    first, last = counts[0], counts[-1]
    return None if first is None or last is None else last - first


def _sum(values: Sequence[float | None]) -> float | None:
    """None if there are none, or if one of them is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
