"""What bounds a stage, and one forward of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from pipespec.config import Schedule
from pipespec.state.candidates import Twig
from pipespec.state.outcomes import Branch, Budget, RankStats
from pipespec.state.tail import TailToken

OUTPUT_EVERY_S: Final = 0.01  # to wake the launcher takes time of a core that a stage may need
LEAST_AHEAD: Final = 4  # tokens that the next stage may wait for
LEAST_ROWS: Final = 32  # for branches, or it is not worth it


@dataclass(slots=True)
class Role:
    """Where a stage stands and what bounds it; one object for all its requests.

    run_ahead: tokens it may be ahead of the last verdict (the last stage has no such bound).
    max_candidates: the most that the stage before it may be ahead. batch: tokens that a first draft
    collects before it sends them. A policy may change the bounds between two transitions.
    output_every_s: a target tells the launcher of its tokens no more often. is_alone: it does not
    tell the stage above for now.
    least_ahead: so many however unlikely it is that the verdict will accept them; more only while
    it is likely enough. context_length: positions that the stage's own model can hold; a draft
    whose context is full stops drafting, the target's was checked before the request was submitted.
    outcomes: what it may spend on verdicts that may come. max_branch_tokens: the most that the
    stage before it may prepare for its verdicts. max_twigs: candidates that it may verify beside
    the main path.
    """

    index: int
    num_stages: int
    run_ahead: int
    max_candidates: int
    batch: int = 1
    context_length: int = 1 << 40
    outcomes: Budget = Budget()
    max_branch_tokens: int = 0
    max_twigs: int = 0
    least_ahead: int = 1 << 30
    output_every_s: float = 0.0
    is_alone: bool = False
    is_first: bool = field(init=False)
    is_last: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_first, self.is_last = self.index == 0, self.index == self.num_stages - 1

    @classmethod
    def of(
        cls, schedule: Schedule, index: int, num_stages: int, context_length: int, tail_rows: int
    ) -> Role:
        """Of a stage of async-chain. tail_rows: cache rows beyond its context that its runner has
        for branches."""
        ahead, budget = schedule.run_ahead, Budget(schedule.outcomes)
        # Rows in use may lie apart, and the own text comes before them.
        num_rows = (tail_rows - ahead - budget.length - 1) // 2 - schedule.tree
        budget = replace(budget, num_rows=min(budget.num_rows, num_rows))
        can_branch = num_rows >= LEAST_ROWS
        # What a stage between drafts has been accepted once: that it is likely says more.
        heeds = schedule.stops_where_dead and index == 0
        least = max(LEAST_AHEAD, schedule.lookahead or 0) if heeds else ahead
        return cls(
            index,
            num_stages,
            run_ahead=ahead,
            max_candidates=ahead,
            context_length=context_length,
            outcomes=budget if can_branch and index < num_stages - 1 else Budget(),
            max_branch_tokens=budget.most_tokens(ahead) if index > 0 else 0,
            max_twigs=schedule.tree if can_branch and index > 0 else 0,
            least_ahead=least,
            output_every_s=OUTPUT_EVERY_S,
        )

    def worth_drafting(self, stats: RankStats) -> int:
        """How many tokens ahead of the last verdict are of use, as verdicts have been."""
        return min(self.run_ahead, max(self.least_ahead, stats.num_alive()))


class Step(NamedTuple):
    """One forward to run: feed `ids` at position `start`, take the draws after the last
    `num_candidates + 1` of them. `base` is the position that the first draw is for.

    tail: tokens to feed as well, with a draw after each: candidates beside the main path (`twigs`),
    then the next token of each of `branches`. keep: before that, cache rows to copy to `keep_start`
    and after: what was fed as a tail and became the own sequence. num_more: forwards that may
    follow within the step, as long as nothing arrives, each over what the one before drew; `rounds`
    of them go on from each of `tail`, in descending order, in rows after those of the one before.

    A named tuple, like all that is made several times a step: a frozen dataclass takes three times
    as long to make.
    """

    request: int
    start: int
    ids: tuple[int, ...]
    num_candidates: int
    is_prefill: bool = False
    tail: tuple[TailToken, ...] = ()
    twigs: tuple[Twig, ...] = ()
    branches: tuple[Branch, ...] = ()
    keep: tuple[int, ...] = ()
    keep_start: int = 0
    num_more: int = 0
    rounds: tuple[int, ...] = ()

    @property
    def query_length(self) -> int:
        """Tokens that are fed."""
        return len(self.ids) + len(self.tail)

    @property
    def num_draws(self) -> int:
        """Draws of the own sequence; none if only branches are fed."""
        return self.num_candidates + 1 if self.ids else 0

    @property
    def base_index(self) -> int:
        """Where the candidates begin in `ids`."""
        return len(self.ids) - self.num_candidates

    @property
    def base(self) -> int:
        return self.start + self.base_index

    @property
    def end(self) -> int:
        return self.start + len(self.ids)
