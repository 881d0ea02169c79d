"""The one table of a benchmark. Numbers come from `metrics`; here they only become text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from pipespec.metrics import Summary, speed_up, summarise

Result = Mapping[str, Any]
NOTHING = "-"
ROOMY_WIDTH = 90


@dataclass(frozen=True, slots=True)
class TableRow:
    """One strategy: its results, and greedy's where there are any."""

    strategy: str
    results: Sequence[Result]
    greedy: Sequence[Result]
    differing: frozenset[int]  # sample indexes

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        summary = summarise(self.results)
        return (
            self.strategy,
            _number(summary.tokens_per_s, 1),
            _number(summary.ms_per_token, 2),
            _first_token(summary),
            self._speed_up(),
            _pairs(summary.acceptance_rate, 3),
            _pairs(summary.block_efficiency, 2),
            self._same_text(),
        )

    def _speed_up(self) -> str:
        if self.strategy == "greedy":
            return "1.00x"
        ratio = speed_up(self.results, self.greedy).speed_up
        return NOTHING if ratio is None else f"{ratio:.2f}x"

    def _same_text(self) -> str:
        num_matched = speed_up(self.results, self.greedy).num_matched
        if self.strategy == "greedy" or not num_matched:
            return NOTHING
        if self.differing:
            return f"no, {num_matched - len(self.differing)}/{num_matched}"
        return "yes"


def summary_table(rows: Sequence[TableRow], width: int) -> Table:
    """Strategies as rows; up to three models fit into a `width` of 80 columns. With three models or
    more, acceptance and block efficiency have one value a pair, the target's last."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if width >= ROOMY_WIDTH else 0, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    for header in ("tokens/s", "ms/token", "time to\nfirst\ntoken", "speed-up"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("acceptance\nrate", "block\nefficiency"):
        table.add_column(header, justify="right")
    table.add_column("same text\nas greedy", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def _number(value: float | None, num_digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{num_digits}f}"


def _first_token(summary: Summary) -> str:
    seconds = summary.time_to_first_token_s
    if seconds is None:
        return NOTHING
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _pairs(values: Sequence[float | None], num_digits: int) -> str:
    return " ".join(_number(value, num_digits) for value in values) or NOTHING
