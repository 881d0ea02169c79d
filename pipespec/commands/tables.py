"""The one table of a benchmark. Numbers come from `metrics`; here they only become text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from pipespec.metrics import Summary, speed_up, summarise

Result = Mapping[str, Any]
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One strategy: its results, and greedy's where there are any."""

    strategy: str
    results: Sequence[Result]
    greedy: Sequence[Result]
    differing: frozenset[int]  # sample indexes

    def cells(self) -> dict[str, str]:
        """The row as text, by the headers of the columns."""
        summary = summarise(self.results)
        return {column.header: column.cell(self, summary) for column in COLUMNS}

    def speed_up(self) -> str:
        if self.strategy == "greedy":
            return "1.00x"
        ratio = speed_up(self.results, self.greedy).speed_up
        return NOTHING if ratio is None else f"{ratio:.2f}x"

    def same_text(self) -> str:
        num_matched = speed_up(self.results, self.greedy).num_matched
        if self.strategy == "greedy" or not num_matched:
            return NOTHING
        if self.differing:
            return f"no, {num_matched - len(self.differing)}/{num_matched}"
        return "yes"


@dataclass(frozen=True, slots=True)
class _Column:
    """narrow: the header where room is scarce. wraps: has a value a pair or a stage, which may go
    on several lines. is_optional: left out where no row knows it. is_spare: says what another
    column says, and goes where room is scarcest."""

    header: str
    narrow: str
    cell: Callable[[TableRow, Summary], str]
    wraps: bool = False
    is_optional: bool = False
    is_spare: bool = False


@dataclass(frozen=True, slots=True)
class _Layout:
    """How much room a table takes; the roomiest that fits is used."""

    padding: int
    is_narrow: bool = False
    has_spare: bool = True


COLUMNS: Final = (
    _Column("strategy", "strategy", lambda row, _: row.strategy),
    _Column("tokens/s", "tokens/s", lambda _, s: _number(s.tokens_per_s, 1)),
    _Column("ms/token", "ms/\ntoken", lambda _, s: _number(s.ms_per_token, 2), is_spare=True),
    _Column("time to\nfirst\ntoken", "time to\nfirst\ntoken", lambda _, s: _first_token(s)),
    _Column("speed-up", "speed-\nup", lambda row, _: row.speed_up()),
    _Column(
        "acceptance\nrate", "accept.\nrate", lambda _, s: _several(s.acceptance_rate, 3), wraps=True
    ),
    _Column(
        "block\nefficiency",
        "block\neffic.",
        lambda _, s: _several(s.block_efficiency, 2),
        wraps=True,
    ),
    _Column("J/token", "J/\ntoken", lambda _, s: _joules(s.energy_per_token_j), is_optional=True),
    _Column(
        "utilization\n(%)",
        "util.\n(%)",
        lambda _, s: _utilization(s.mean_utilization),
        wraps=True,
        is_optional=True,
    ),
    _Column("same text\nas greedy", "same text\nas greedy", lambda row, _: row.same_text()),
)
LAYOUTS: Final = (
    _Layout(padding=1),
    _Layout(padding=0),
    _Layout(padding=0, is_narrow=True),
    _Layout(padding=0, is_narrow=True, has_spare=False),
)


def summary_table(rows: Sequence[TableRow], width: int) -> Table:
    """Strategies as rows, in a form that fits into `width` columns, from 80 on with up to three
    models. With three models or more, acceptance and block efficiency have one value a pair, the
    target's last, and utilization one a stage. What no row knows has no column."""
    cells = [row.cells() for row in rows]
    columns = [
        column
        for column in COLUMNS
        if not column.is_optional or any(row[column.header] != NOTHING for row in cells)
    ]
    tables = [_table(columns, cells, layout) for layout in LAYOUTS]
    return next((table for table in tables if _width(table) <= width), tables[-1])


def _table(
    columns: Sequence[_Column], cells: Sequence[Mapping[str, str]], layout: _Layout
) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, layout.padding, 0, 0),
    )
    shown = [column for column in columns if layout.has_spare or not column.is_spare]
    for column in shown:
        table.add_column(
            column.narrow if layout.is_narrow else column.header,
            justify="left" if column is COLUMNS[0] else "right",
            no_wrap=not column.wraps,
        )
    for row in cells:
        table.add_row(*(row[column.header] for column in shown))
    return table


def _width(table: Table) -> int:
    """Of the table if nothing in it wraps."""
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum


def _number(value: float | None, num_digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{num_digits}f}"


def _first_token(summary: Summary) -> str:
    seconds = summary.time_to_first_token_s
    if seconds is None:
        return NOTHING
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _joules(value: float | None) -> str:
    return _number(value, 3 if value is not None and value < 1 else 2)


def _utilization(values: Sequence[float | None]) -> str:
    """One value for all stages where they share their devices."""
    return _several(values[:1] if len(set(values)) == 1 else values, 0)


def _several(values: Sequence[float | None], num_digits: int) -> str:
    if all(value is None for value in values):
        values = values[:1]
    return " ".join(_number(value, num_digits) for value in values) or NOTHING
