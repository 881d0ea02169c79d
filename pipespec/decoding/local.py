"""Runners in the caller's own process, on the device the config gave them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Final

from pipespec.decoding.hierarchy import Hierarchy
from pipespec.placement import StagePlacement
from pipespec.runners.base import ModelRunner
from pipespec.runners.factory import load_runner
from pipespec.runners.ranges import with_ranges
from pipespec.runners.warm_up import warm_up

log = logging.getLogger(__name__)

_WARM_UP_LENGTH: Final = 8


def load_runners(hierarchy: Hierarchy, *, ranges: bool = False) -> list[ModelRunner]:
    """Loads every model of the hierarchy here; on an error, none stays loaded. ranges: with NVTX
    ranges around the forwards of those on GPUs."""
    runners: list[ModelRunner] = []
    try:
        for index, model in enumerate(hierarchy.models):
            runners.append(
                load_runner(
                    model,
                    hierarchy.in_process(index),
                    hierarchy.folders[index],
                    hierarchy.vocab_size,
                    hierarchy.context_length,
                )
            )
            warm_up(runners[-1], _WARM_UP_LENGTH)
    except BaseException:
        close_all(runners)
        raise
    if not ranges:
        return runners
    return [with_ranges(runner, index, len(runners)) for index, runner in enumerate(runners)]


def close_all(runners: list[ModelRunner]) -> None:
    for runner in runners:
        runner.close()


@contextlib.contextmanager
def pinned(placement: StagePlacement) -> Iterator[None]:
    """Gives this thread the cores and torch the threads that the stage would have as a process, so
    that strategies are compared on the same hardware; both are given back."""
    torch = sys.modules.get("torch")
    cores_before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    threads_before = torch.get_num_threads() if torch else None
    try:
        if placement.cores and cores_before is not None:
            _set_affinity(set(placement.cores))
        if torch and placement.device == "cpu":
            torch.set_num_threads(placement.threads)
        yield
    finally:
        if cores_before is not None:
            _set_affinity(cores_before)
        if torch and threads_before is not None:
            torch.set_num_threads(threads_before)


def _set_affinity(cores: set[int]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:  # a container may forbid it; the text is the same, only slower
        log.warning("cannot pin to cores %s: %s", sorted(cores), error)
