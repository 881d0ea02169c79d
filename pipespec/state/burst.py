"""Several forwards in one step: a first draft draws on from what it drew, as long as nobody speaks.

For what comes of it they count as one forward that had verified its own draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipespec.state.outcomes import Ranked, grow
from pipespec.state.step import Step
from pipespec.state.tail import TailToken


class Burst:
    """The forwards of a step that are done already, while another one is in flight.

    reserved: cache rows for those that may follow. is_cut: none may.
    """

    __slots__ = ("_drawn", "is_cut", "reserved", "steps")

    def __init__(self, reserved: range) -> None:
        self.steps: list[Step] = []
        self._drawn: list[Ranked] = []  # for the own sequence
        self.reserved = reserved
        self.is_cut = False

    def go_on(self, step: Step, draws: Sequence[Ranked]) -> Step | None:
        """`step` drew this: the forward that follows it; None if there is none. Branches grow."""
        rounds = tuple([left - 1 for left in step.rounds if left])
        if not step.num_more or not (step.ids or rounds):
            return None
        beside, branches = draws[step.num_draws :], step.branches[: len(rounds)]
        grow(step.branches, beside)
        self.steps.append(step)
        self._drawn += draws[: step.num_draws]
        tail = [
            TailToken(ranked[0], before.position + 1, row, before.row)
            for ranked, before, row in zip(beside, step.tail, self.reserved[: len(rounds)])
        ]
        for branch, feed in zip(branches, tail):
            branch.rows.append(feed.row)
        self.reserved = self.reserved[len(rounds) :]
        return Step(
            step.request,
            step.end,
            (draws[0][0],) if step.ids else (),
            0,
            tail=tuple(tail),
            branches=branches,
            num_more=step.num_more - 1,
            rounds=rounds,
        )

    def end(self, last: Step, draws: Sequence[Ranked]) -> tuple[Step, Sequence[Ranked]]:
        """The last forward drew this: what all of them amount to, and its draws."""
        self.steps.append(last)
        if len(self.steps) == 1:
            return last, draws
        fed = tuple(ranked[0] for ranked in self._drawn)
        first, draws = self.steps[0], [*self._drawn, *draws]
        step = last._replace(start=first.start, ids=first.ids + fed, num_candidates=len(fed))
        return step, draws
