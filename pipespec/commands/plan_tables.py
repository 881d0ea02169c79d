"""What `plan` prints: tables of at most 80 columns, and sentences that say what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from pipespec.metrics import Summary
from pipespec.planning.devices import Allocation, Answer
from pipespec.planning.search import Plan, Ranking, Useless
from pipespec.planning.system import Choice, Cost, System
from pipespec.simulate.prediction import Prediction

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Trial:
    """A choice that was run, its results in `path`. target_step_s: mean forward of the target, but
    for prompts. predictions: by all costs."""

    choice: Choice
    path: Path
    summary: Summary
    target_step_s: float
    predictions: Mapping[Cost, Prediction]

    @property
    def ideal(self) -> Prediction:
        return self.predictions[Cost.IDEAL]

    @property
    def real(self) -> Prediction:
        return self.predictions[Cost.REAL]

    @property
    def measured(self) -> float:
        """Tokens per second."""
        assert self.summary.tokens_per_s is not None
        return self.summary.tokens_per_s

    @property
    def efficiency(self) -> float:
        """Pipeline efficiency: measured / ideal."""
        return self.measured / self.ideal.tokens_per_s


def ranking_table(ranking: Ranking) -> Table:
    """The best plan of each set of stages and strategy."""
    table = _table()
    table.add_column("#", justify="right")
    table.add_column("stages", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    table.add_column("flags", max_width=13)
    for header in ("tokens\n/s", "ms/\ntoken", "speed-\nup", "block\neffic.", "busy, %"):
        table.add_column(header, justify="right", no_wrap=True)
    for rank, plan in enumerate(ranking.best_of_each(), 1):
        prediction = plan.prediction
        table.add_row(
            str(rank),
            stages_text(plan.choice),
            plan.choice.strategy,
            flags_text(plan.choice) or NOTHING,
            f"{plan.tokens_per_s:,.1f}",
            f"{prediction.ms_per_token:.2f}",
            f"{plan.tokens_per_s / ranking.greedy.tokens_per_s:.2f}x",
            _number(prediction.block_efficiency),
            " ".join(f"{100 * share:.0f}" for share in prediction.busy_shares),
        )
    return table


def useless_line(item: Useless, system: System) -> str:
    """A stage that does not pay."""
    return f"without {system.models[item.stage].name}: {item.gain:+.1%}"


def allocation_table(found: Sequence[Allocation]) -> Table:
    """The best plan for each way to give out devices."""
    table = _table()
    for header in ("devices\nin all", "of the\ntarget"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("stages", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    table.add_column("flags", max_width=13)
    for header in ("tokens\n/s", "ms/\ntoken"):
        table.add_column(header, justify="right", no_wrap=True)
    for item in found:
        table.add_row(
            str(item.num_devices),
            str(item.num_target_devices),
            stages_text(item.plan.choice),
            item.plan.choice.strategy,
            flags_text(item.plan.choice) or NOTHING,
            f"{item.plan.tokens_per_s:,.1f}",
            f"{item.plan.prediction.ms_per_token:.2f}",
        )
    return table


def answer_lines(best: Allocation, answer: Answer | None, system: System) -> list[str]:
    """A device more for the target, or for a draft?"""
    lines = [f"best of all: {_allocation_text(best, system)}"]
    if answer is None:
        return lines
    base = answer.base
    lines.append(f"best with a device less: {_allocation_text(base, system)}")
    for whom, option in (("the target", answer.for_target), ("a draft", answer.for_draft)):
        if option is None:
            lines.append(f"a device more for {whom}: not possible")
        else:
            gain = option.plan.tokens_per_s / base.plan.tokens_per_s - 1.0
            lines.append(f"a device more for {whom}: {gain:+.1%}")
    return lines


def trial_table(trials: Sequence[Trial]) -> Table:
    """Measured beside predicted and ideal."""
    table = _table()
    table.padding = (0, 0)  # or it has more than 80 columns
    table.add_column("stages", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    headers = ("measured\ntokens/s", "predicted\ntokens/s", "off by", "ideal\ntokens/s")
    for header in (*headers, "pipeline\neffic.", "block effic.\n(predicted)"):
        table.add_column(header, justify="right", no_wrap=True)
    for item in trials:
        blocks = item.summary.block_efficiency
        pair = f"{_number(blocks[-1])} ({_number(item.real.block_efficiency)})" if blocks else ""
        table.add_row(
            stages_text(item.choice),
            item.choice.strategy,
            f"{item.measured:,.1f}",
            f"{item.real.tokens_per_s:,.1f}",
            f"{item.real.tokens_per_s / item.measured - 1.0:+z.1%}",
            f"{item.ideal.tokens_per_s:,.1f}",
            f"{item.efficiency:.2f}",
            pair or NOTHING,
        )
    return table


def loss_line(item: Trial) -> str:
    """Where a run's time goes that the ideal does not take, in parts of the run's time; whether the
    machine was as fast as when it was measured; and how often a draft had prepared for what the
    target drew instead."""
    measured_s = 1.0 / item.measured  # a token
    ideal_s, shared_s, slower_s, real_s = (
        1.0 / item.predictions[cost].tokens_per_s for cost in Cost
    )
    parts = (
        ("shared memory", shared_s - ideal_s),
        ("forwards slower for other reasons", slower_s - shared_s),
        ("loops and messages", real_s - slower_s),
        ("not foreseen", measured_s - real_s),
    )
    told = ", ".join(f"{name} {part / measured_s:z.1%}" for name, part in parts)
    line = (
        f"time of {item.choice.strategy} beyond the ideal: {told}; target's forwards "
        f"{1e3 * item.target_step_s:.2f} ms (predicted {1e3 * item.real.target_step_s:.2f})"
    )
    if item.choice.strategy == "async-chain" and item.choice.schedule.outcomes:
        hits = item.summary.outcome_hit_rate[-1]
        predicted = item.real.outcome_hit_rate
        line += f"; outcome hit rate {_number(hits)} (predicted {_number(predicted)})"
    return line


def stages_text(choice: Choice) -> str:
    return ">".join(str(stage) for stage in choice.stages)


def flags_text(choice: Choice) -> str:
    """The flags that are not at their defaults, for a person."""
    return ", ".join(f"{name} {value}" for name, value in choice.flags.items())


def describe(plan: Plan, system: System) -> str:
    """A plan in words."""
    names = " > ".join(system.models[stage].name for stage in plan.choice.stages)
    flags = flags_text(plan.choice)
    return f"{plan.choice.strategy} of {names}{f', {flags}' if flags else ''}"


def _allocation_text(item: Allocation, system: System) -> str:
    count = item.num_target_devices
    drafts = [system.models[stage].name for stage in item.drafts]
    return (
        f"{count} device{'' if count == 1 else 's'} for the target, "
        f"{' and '.join(drafts) if drafts else 'no draft'}: "
        f"{item.plan.tokens_per_s:,.1f} tokens/s with {item.num_devices} in all"
    )


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
