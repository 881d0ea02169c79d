"""What `plan` prints: tables of at most 80 columns, and sentences that say what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from pipespec.planning.devices import Allocation, Answer
from pipespec.planning.search import Plan, Ranking, Useless
from pipespec.planning.system import Choice, System

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A choice that was run, its results in `path`: tokens/s as measured, as predicted, and
    without any cost between forwards (ideal), or none but that of cores that are shared."""

    choice: Choice
    path: Path
    measured: float
    predicted: float
    ideal: float
    shared: float
    measured_block: float | None
    predicted_block: float | None
    measured_hits: float | None
    predicted_hits: float | None

    @property
    def efficiency(self) -> float:
        """Pipeline efficiency: measured / ideal."""
        return self.measured / self.ideal


def legend(system: System) -> list[str]:
    """Which stage has which number."""
    return [f"{index}: {model.name}" for index, model in enumerate(system.models)]


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


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Measured beside predicted and ideal."""
    table = _table()
    table.add_column("stages", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    headers = ("measured\ntokens/s", "predicted\ntokens/s", "off by", "ideal\ntokens/s")
    for header in (*headers, "pipeline\neffic.", "block effic.\n(predicted)"):
        table.add_column(header, justify="right", no_wrap=True)
    for item in outcomes:
        table.add_row(
            stages_text(item.choice),
            item.choice.strategy,
            f"{item.measured:,.1f}",
            f"{item.predicted:,.1f}",
            f"{item.predicted / item.measured - 1.0:+.1%}",
            f"{item.ideal:,.1f}",
            f"{item.efficiency:.2f}",
            f"{_number(item.measured_block)} ({_number(item.predicted_block)})",
        )
    return table


def loss_line(item: Outcome) -> str:
    """Where a run's time goes that the ideal does not take, in parts of the run's time; and how
    often a draft had prepared for what the target drew instead."""
    total = 1.0 / item.measured
    shared, between = 1.0 / item.shared - 1.0 / item.ideal, 1.0 / item.predicted - 1.0 / item.shared
    rest = total - 1.0 / item.predicted
    parts = (
        ("models beside each other", shared),
        ("loops and messages", between),
        ("not foreseen", rest),
    )
    told = ", ".join(f"{name} {part / total:.1%}" for name, part in parts)
    hits = ""
    if item.choice.schedule.outcomes:
        measured, predicted = _number(item.measured_hits), _number(item.predicted_hits)
        hits = f"; outcome hit rate {measured}, predicted {predicted}"
    return f"time of {item.choice.strategy} beyond the ideal: {told}{hits}"


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
