"""From a step of the core to calls of a runner: the same for every loop that drives both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from pipespec.config import SamplingParams
from pipespec.runners.base import (
    BranchingRunner,
    BurstRow,
    BurstRunner,
    ModelRunner,
    Row,
    TreeRow,
)
from pipespec.state import StageState, Step

Draws = list[tuple[int, ...]]  # of one forward; tokens best first


def run_step(
    state: StageState,
    runner: ModelRunner,
    slot: int,
    step: Step,
    descriptors: Sequence[int] = (),
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Draws:
    """All forwards of a step that `state` has started: what the last of them drew, which is for
    `state.end_step`. A burst ends once `is_interrupted`, which `descriptors` tell a runner that
    does its forwards by itself."""
    sampling = state.requests[step.request].submit.sampling
    num_ranked = 1 + state.role.outcomes.num_ranked
    following: Step | None = step
    while following is not None:
        *others, draws = forward_step(runner, slot, sampling, following, num_ranked, descriptors)
        for earlier in others:
            state.draw_on(earlier)
        is_over = step.num_more == 0 or is_interrupted()
        following = None if is_over else state.draw_on(draws)
    return draws


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
    tree = TreeRow(row, step.tail, step.keep, step.keep_start, num_ranked)
    if is_burst:  # isinstance() would take 20 us
        burst = BurstRow(tree, step.rounds, step.num_more, descriptors)
        return cast(BurstRunner, runner).forward_burst(burst)
    return [cast(BranchingRunner, runner).forward_tree(tree)]
