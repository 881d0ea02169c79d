"""NVTX ranges around the forwards of a model on GPUs, for Nsight Systems (`launch/nsys.sh`).

A range has the name of what the trace calls the forward: prefill, decode, draft or verify. Every
forward ends with its draws on the host, so a range holds all that it started on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from pipespec.runners.base import (
    BranchingRunner,
    BurstRow,
    BurstRunner,
    ModelRunner,
    Row,
    RunnerInfo,
    TreeRow,
)

Push = Callable[[str], object]
Pop = Callable[[], object]


class RangedRunner:
    """Does what `runner` does, each forward between `push` and `pop`. kind: what a forward after
    the prefill is called."""

    def __init__(self, runner: ModelRunner, kind: str, push: Push, pop: Pop) -> None:
        self._runner = runner
        self._kind = kind
        self._push = push
        self._pop = pop

    @property
    def info(self) -> RunnerInfo:
        return self._runner.info

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """See `ModelRunner.forward`."""
        self._push(self._name(rows[0], sum(len(row.ids) for row in rows)))
        try:
            return self._runner.forward(rows)
        finally:
            self._pop()

    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        """See `BranchingRunner.forward_tree`."""
        self._push(self._name(row.row, len(row.row.ids) + len(row.tail)))
        try:
            return cast(BranchingRunner, self._runner).forward_tree(row)
        finally:
            self._pop()

    def forward_burst(self, burst: BurstRow) -> list[list[tuple[int, ...]]]:
        """See `BurstRunner.forward_burst`; one range for all of its forwards."""
        num_fed = len(burst.tree.row.ids) + len(burst.tree.tail)
        self._push(f"{self._name(burst.tree.row, num_fed)} and up to {burst.num_more} more steps")
        try:
            return cast(BurstRunner, self._runner).forward_burst(burst)
        finally:
            self._pop()

    def release(self, slot: int) -> None:
        """See `ModelRunner.release`."""
        self._runner.release(slot)

    def close(self) -> None:
        """See `ModelRunner.close`."""
        self._runner.close()

    def _name(self, row: Row, num_fed: int) -> str:
        kind = "prefill" if row.start == 0 and row.ids else self._kind
        return f"{kind} {self.info.name}, {num_fed} tokens"


def with_ranges(runner: ModelRunner, stage: int, num_stages: int) -> ModelRunner:
    """The runner with NVTX ranges if its model is on GPUs, else as it is."""
    if runner.info.device in ("cpu", "emulated"):
        return runner
    from torch.cuda import nvtx

    kind = "decode" if num_stages == 1 else "draft" if stage == 0 else "verify"
    return RangedRunner(runner, kind, nvtx.range_push, nvtx.range_pop)
