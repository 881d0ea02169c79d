"""From a step of the core to calls of a runner: the same for every loop that drives both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pipespec.config import SamplingParams
from pipespec.runners.base import (
    BranchingRunner,
    BurstRow,
    BurstRunner,
    ModelRunner,
    Row,
    TailToken,
    TreeRow,
)
from pipespec.state import Step

Draws = list[tuple[int, ...]]  # of one forward; tokens best first


def forward_step(
    runner: ModelRunner,
    slot: int,
    sampling: SamplingParams,
    step: Step,
    num_ranked: int,
    descriptors: Sequence[int] = (),
) -> list[Draws]:
    """Runs the forward that a step asks for, and those after it in a burst if the runner can do
    them by itself: what each drew. None is begun once one of `descriptors` can be read."""
    row = Row(slot, step.start, step.ids, step.num_draws, sampling)
    is_burst = step.num_more > 0 and runner.info.has_bursts
    if num_ranked == 1 and not (step.tail or step.keep or is_burst):
        return [[(token,) for token in runner.forward([row])[0]]]
    tokens = [TailToken(x.token, x.position, x.row, x.parent_row) for x in step.tail]
    tree = TreeRow(row, tokens, step.keep, step.keep_start, num_ranked)
    if is_burst:  # isinstance() would take 20 us
        burst = BurstRow(tree, step.rounds, step.num_more, descriptors)
        return cast(BurstRunner, runner).forward_burst(burst)
    return [cast(BranchingRunner, runner).forward_tree(tree)]
