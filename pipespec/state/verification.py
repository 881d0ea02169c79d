"""What a verification accepts: the path through the candidates that the draws agree with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipespec.state.candidates import Twig
from pipespec.state.outcomes import Ranked
from pipespec.state.step import Step


class Verified(NamedTuple):
    """draws: for each accepted candidate the draw that says so, and after the last of them the
    stage's own token. num_main: accepted candidates of the main path. rows: cache rows of those
    beside it, that were accepted after them."""

    draws: list[Ranked]
    num_main: int
    rows: list[int]


def verify(step: Step, draws: Sequence[Ranked], num_known: int) -> Verified:
    """draws: after the main path's tokens, from position `step.base` on, then after each of
    `step.tail`. num_known: so many candidates of the main path have become own tokens meanwhile."""
    twigs = {(twig.before, twig.token): index for index, twig in enumerate(step.twigs)}
    chosen: list[Ranked] = []
    rows: list[int] = []
    depth = num_known  # on the main path
    place: Twig | int = depth
    ranked = draws[depth]
    while True:
        chosen.append(ranked)
        token = ranked[0]
        if place == depth < step.num_candidates and step.ids[step.base_index + depth] == token:
            place = depth = depth + 1
            ranked = draws[depth]
            continue
        index = twigs.get((place, token))
        if index is None:
            return Verified(chosen, depth - num_known, rows)
        place = step.twigs[index]
        rows.append(step.tail[index].row)
        ranked = draws[step.num_draws + index]
