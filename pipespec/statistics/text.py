"""Tables for a terminal: as many columns as it has room for, the most important ones first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from pipespec.statistics.tables import NAMES_BETWEEN, Column, Row, Table

_ROOMY_WIDTH: Final = 90


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table is drawn. is_short: with short names. is_stacked: a list with one item below the
    other, so that the rates of a pair of models stand beside the draft's name."""

    columns: tuple[Column, ...]
    is_short: bool = False
    is_stacked: bool = False


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Titles, tables and notes. What does not fit is left out, and a note says so."""
    for number, table in enumerate(tables):
        if number:
            console.print()
        layout = fit(table, console)
        console.print(table.title, markup=False, soft_wrap=True)
        console.print()
        console.print(_draw(table, layout, console.width))
        notes = [*table.notes, *_layout_notes(table, layout)]
        if notes:
            console.print()
        for note in notes:
            console.print(note, markup=False)


def fit(table: Table, console: Console) -> Layout:
    """The roomiest layout that the console is wide enough for: short names are the first thing
    that saves room, then the least important columns go. Where nothing helps, cells are folded."""
    columns = table.shown
    layouts = [Layout(columns), Layout(columns, is_stacked=True)]
    by_rank = sorted(columns, key=lambda column: -column.rank)
    for number in range(sum(column.rank > 0 for column in columns) + 1):
        left = tuple(column for column in columns if column not in by_rank[:number])
        layouts += [Layout(left, True), Layout(left, True, is_stacked=True)]
    return next(
        (layout for layout in layouts if _width(table, layout, console) <= console.width),
        layouts[-1],
    )


def _draw(table: Table, layout: Layout, width: int) -> RichTable:
    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if width >= _ROOMY_WIDTH else 0, 0, 0),
    )
    for column in layout.columns:
        drawn.add_column(
            column.header.replace(" ", "\n"),
            justify="left" if column.is_text else "right",
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(*(_cell(table, layout, column, row) for column in layout.columns))
    return drawn


def _cell(table: Table, layout: Layout, column: Column, row: Row) -> Text:
    items = column.cells(row)
    if layout.is_short and column.is_text:
        items = tuple(table.short_names.get(item, item) for item in items)
    between = "\n" if layout.is_stacked else NAMES_BETWEEN if column.is_text else " "
    return Text(between.join(items))


def _width(table: Table, layout: Layout, console: Console) -> int:
    """What it would take to write no cell on more lines than it has."""
    drawn = _draw(table, layout, console.width)
    return Measurement.get(console, console.options.update(max_width=10_000), drawn).maximum


def _layout_notes(table: Table, layout: Layout) -> list[str]:
    """What the layout does not say."""
    notes = []
    if layout.is_short:
        texts = [column for column in layout.columns if column.is_text]
        shown = {item for row in table.rows for column in texts for item in column.cells(row)}
        short = sorted(
            (short, name) for name, short in table.short_names.items() if name in shown - {short}
        )
        notes += [", ".join(f"{short}: {name}" for short, name in short)] if short else []
    left_out = [column.header for column in table.shown if column not in layout.columns]
    if left_out:
        notes.append(f"no room for: {', '.join(left_out)} (--format csv has them)")
    return notes
