"""A device more for the target, or for a draft? For targets that may be spread over several.

What is given is the target's step times on 1, 2, 4, ... devices; each draft keeps the devices of
its config. Every way to give out at most so many devices is searched for its best plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipespec.emulation import parse_emulation
from pipespec.errors import DataError, UsageError
from pipespec.planning.search import Plan, all_subsets, search
from pipespec.planning.system import System
from pipespec.planning.times import EmulatedTimes, Times

_FORM = 'a JSON object like {"1": {"1": 60, "8": 62}, "2": {"1": 33, "8": 34}}'


@dataclass(frozen=True, slots=True)
class Allocation:
    """So many devices for the target, the drafts' beside them, and the best plan on those."""

    num_target_devices: int
    num_devices: int
    plan: Plan

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.plan.choice.stages[:-1]


@dataclass(frozen=True, slots=True)
class Answer:
    """What to do with one device more than `base` has. Options are None where the device cannot be
    used that way: no table for so many, no draft left that fits."""

    base: Allocation
    for_target: Allocation | None
    for_draft: Allocation | None


def read_target_times(path: Path) -> dict[int, Times]:
    """The target's step times by number of devices: an object of tables as in "step_ms".

    Raises:
        DataError: the file cannot be read or is none of that kind; names it.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--target-step-ms: {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--target-step-ms: {path} is not JSON ({error})") from error
    if not isinstance(values, Mapping) or not values:
        raise DataError(f"--target-step-ms: {path} must hold {_FORM}")
    found: dict[int, Times] = {}
    for key, table in values.items():
        if not (key.isdecimal() and 1 <= int(key) <= 4096):
            raise DataError(f'--target-step-ms: {path}: "{key}" is no number of devices; {_FORM}')
        try:
            emulation = parse_emulation({"step_ms": table}, f'"{key}"')
        except UsageError as error:
            raise DataError(f"--target-step-ms: {path}: {error}") from error
        found[int(key)] = EmulatedTimes(emulation)
    return dict(sorted(found.items()))


def allocations(
    system: System,
    tables: Mapping[int, Times],
    num_devices: int,
    on_allocation: Callable[[Allocation], None],
) -> list[Allocation]:
    """The best plan for each number of the target's devices and each set of drafts that fit into
    `num_devices` together; fastest first. on_allocation: told of each as it is found."""
    found = []
    for count, times in tables.items():
        spread = system.with_target_times(times, count)
        for stages in all_subsets(spread):
            needed = sum(spread.models[stage].num_devices for stage in stages)
            if needed <= num_devices:
                best = _best_with(spread, stages)
                found.append(Allocation(count, needed, best))
                on_allocation(found[-1])
    return sorted(found, key=lambda item: (-item.plan.tokens_per_s, item.num_devices))


def one_more(found: list[Allocation], num_devices: int) -> Answer | None:
    """What the last of `num_devices` is worth where. None if fewer cannot run anything."""
    base = _fastest([item for item in found if item.num_devices < num_devices])
    if base is None:
        return None
    same_drafts = [
        item
        for item in found
        if item.drafts == base.drafts and item.num_target_devices > base.num_target_devices
    ]
    same_target = [
        item
        for item in found
        if item.num_target_devices == base.num_target_devices
        and set(item.drafts) > set(base.drafts)
    ]
    return Answer(base, _fastest(same_drafts), _fastest(same_target))


def _fastest(found: list[Allocation]) -> Allocation | None:
    return max(found, key=lambda item: item.plan.tokens_per_s, default=None)


def _best_with(system: System, stages: tuple[int, ...]) -> Plan:
    """The best plan that uses exactly these stages."""
    ranking = search(system, [stages])
    return next(plan for plan in ranking.plans if plan.choice.stages == stages)
