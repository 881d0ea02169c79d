"""Which models, in which strategy, with which flags: simulates them all and ranks them.

Every subset with the target is looked at, ordered by step time; of the flags, a sensible few along
one axis at a time: first when to verify, then how far to run ahead, then how many outcomes to
prepare for and how many of their tokens to verify beside the main path. Short pieces of the texts
decide what is worth a long look. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final

from pipespec.config import Schedule
from pipespec.messages import Submit
from pipespec.planning.system import Choice, System
from pipespec.simulate.prediction import Prediction

CHAIN_LOOKAHEADS: Final = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
ASYNC_LOOKAHEADS: Final = (0, 1, 2, 3, 4, 6, 8, 12)
DOWNWARDS: Final = 0.85  # of the best: longer lookaheads than this one are worse still
RUN_AHEADS: Final = (4, 8, 32)  # beside the default
OUTCOMES: Final = (1, 2, 4)
MOST_OUTCOMES: Final = max(OUTCOMES)
TREES: Final = (4, 8)
NUM_FINALISTS: Final = 3  # of each subset and strategy
SHORT_TOKENS: Final = 180
LONG_TOKENS: Final = 1600
_MIN_TEXTS: Final = 3

OnSimulated = Callable[[Choice], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice and what it would do."""

    choice: Choice
    prediction: Prediction

    @property
    def tokens_per_s(self) -> float:
        return self.prediction.tokens_per_s


@dataclass(frozen=True, slots=True)
class Ranking:
    """plans: best first, the best of each subset and strategy among them, greedy too; all simulated
    on the same texts, `num_texts` of them with `num_tokens` tokens. num_simulated: choices that
    were looked at."""

    plans: tuple[Plan, ...]
    num_simulated: int
    num_texts: int
    num_tokens: int

    @property
    def best(self) -> Plan:
        return self.plans[0]

    @property
    def greedy(self) -> Plan:
        return next(plan for plan in self.plans if plan.choice.strategy == "greedy")

    def best_of_each(self) -> list[Plan]:
        """The best plan of each subset and strategy, best first."""
        found: dict[tuple[tuple[int, ...], str], Plan] = {}
        for plan in self.plans:
            found.setdefault((plan.choice.stages, plan.choice.strategy), plan)
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Useless:
    """A stage without which the best plan would be better. gain: by so much of the speed with it;
    0.07 is 7 %."""

    stage: int
    gain: float


def search(
    system: System,
    subsets: Iterable[tuple[int, ...]] | None = None,
    on_simulated: OnSimulated = lambda _choice: None,
) -> Ranking:
    """Ranks the ways to run the system. subsets: of stages, by default all with the target.

    on_simulated: called after each simulation.
    """
    look = _Look(system, sample(system.submits, SHORT_TOKENS), on_simulated)
    finalists = [Choice((system.target,), "greedy")]
    for stages in all_subsets(system) if subsets is None else subsets:
        if len(stages) > 1:
            finalists += look.best_chains(stages)
            finalists += look.best_async_chains(stages)
    submits = sample(system.submits, LONG_TOKENS)
    plans = []
    for choice in finalists:
        plans.append(Plan(choice, system.predict(choice, submits)))
        on_simulated(choice)
    return Ranking(
        plans=tuple(sorted(plans, key=_order)),
        num_simulated=look.num_simulated + 1,
        num_texts=len(submits),
        num_tokens=sum(submit.max_new_tokens for submit in submits),
    )


def all_subsets(system: System) -> list[tuple[int, ...]]:
    """Every subset of the drafts with the target, drafts in the order of their step times; smaller
    subsets first."""
    drafts = sorted(range(system.target), key=lambda index: (system.step_s(index), index))
    return [
        (*chosen, system.target)
        for count in range(len(drafts) + 1)
        for chosen in combinations(drafts, count)
    ]


def useless_stages(ranking: Ranking) -> list[Useless]:
    """Drafts that do not pay: of each, how the best plan without it compares with the best of those
    that have it and all that the other has, where the former is better."""
    found = []
    groups = ranking.best_of_each()
    for stage in sorted({stage for plan in groups for stage in plan.choice.stages}):
        without = _fastest(plan for plan in groups if stage not in plan.choice.stages)
        if without is None:
            continue  # the target
        wanted = {*without.choice.stages, stage}
        beside = _fastest(plan for plan in groups if set(plan.choice.stages) == wanted)
        if beside is not None and without.tokens_per_s > beside.tokens_per_s:
            found.append(Useless(stage, without.tokens_per_s / beside.tokens_per_s - 1.0))
    return found


def sample(submits: Sequence[Submit], num_tokens: int) -> tuple[Submit, ...]:
    """About `num_tokens` tokens of the texts: some of them, evenly spaced, the first ones of each.

    All texts whole if that is not more; at least three texts, if there are.
    """
    total = sum(submit.max_new_tokens for submit in submits)
    count = min(len(submits), max(_MIN_TEXTS, len(submits) * num_tokens // total))
    chosen = [submits[place * len(submits) // count] for place in range(count)]
    if total <= num_tokens:
        return tuple(chosen)
    most = max(1, num_tokens // count)
    return tuple(replace(item, max_new_tokens=min(item.max_new_tokens, most)) for item in chosen)


@dataclass(slots=True)
class _Look:
    """A short look at many choices."""

    system: System
    submits: tuple[Submit, ...]
    on_simulated: OnSimulated
    num_simulated: int = 0

    def best_chains(self, stages: tuple[int, ...]) -> list[Choice]:
        tried = self._lookaheads(Choice(stages, "chain"), CHAIN_LOOKAHEADS)
        return [plan.choice for plan in sorted(tried, key=_order)[:NUM_FINALISTS]]

    def best_async_chains(self, stages: tuple[int, ...]) -> list[Choice]:
        """One kind of flag after the other, from what was best so far."""
        default = Choice(stages, "async-chain", Schedule(outcomes=0))
        tried = self._lookaheads(default, ASYNC_LOOKAHEADS)
        tried += self._simulate([replace(default, schedule=Schedule("pipespec", 0))])
        for plan in sorted(tried, key=_order)[:2]:
            tried += self._simulate(_with(plan.choice, run_ahead=count) for count in RUN_AHEADS)
        if any(self.system.models[stage].num_tail_rows for stage in stages[:-1]):
            starts = dict.fromkeys((min(tried, key=_order).choice, default))
            prepared = self._simulate(
                _with(start, outcomes=count) for start in starts for count in OUTCOMES
            )
            best = min(prepared, key=_order).choice
            tried += prepared + self._simulate(_with(best, tree=count) for count in TREES)
        return [plan.choice for plan in sorted(tried, key=_order)[:NUM_FINALISTS]]

    def _lookaheads(self, auto: Choice, counts: Sequence[int]) -> list[Plan]:
        """Of `auto` and of fixed ones, from the least up until they lead downwards."""
        fixed: list[Plan] = []
        for count in counts:
            fixed += self._simulate([_with(auto, lookahead=count)])
            if fixed[-1].tokens_per_s < DOWNWARDS * max(plan.tokens_per_s for plan in fixed):
                break
        return self._simulate([auto]) + fixed

    def _simulate(self, choices: Iterable[Choice]) -> list[Plan]:
        plans = []
        for choice in choices:
            plans.append(Plan(choice, self.system.predict(choice, self.submits)))
            self.num_simulated += 1
            self.on_simulated(choice)
        return plans


def _with(choice: Choice, **changes: Any) -> Choice:
    """The same with other flags."""
    return replace(choice, schedule=replace(choice.schedule, **changes))


def _fastest(plans: Iterable[Plan]) -> Plan | None:
    return min(plans, key=_order, default=None)


def _order(plan: Plan) -> tuple[float, int, int]:
    """Faster first; of equals, the one with fewer stages, then that nearest to the defaults."""
    return -plan.tokens_per_s, len(plan.choice.stages), len(plan.choice.flags)
