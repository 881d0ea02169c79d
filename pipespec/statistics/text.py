"""Tables for a terminal: as many columns as it has room for, the most important ones first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

from pipespec.statistics.tables import NAMES_BETWEEN, Column, Table

_ROOMY_WIDTH: Final = 90


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Titles, tables and notes. What does not fit is left out, and a note says so."""
    for number, table in enumerate(tables):
        if number:
            console.print()
        rich_table, left_out = fit(table, console)
        console.print(table.title, markup=False, soft_wrap=True)
        console.print()
        console.print(rich_table)
        notes = list(table.notes)
        if left_out:
            names = ", ".join(column.header for column in left_out)
            notes.append(f"no room for: {names} (--format csv has them)")
        if notes:
            console.print()
        for note in notes:
            console.print(note, markup=False)


def fit(table: Table, console: Console) -> tuple[RichTable, list[Column]]:
    """A table that is no wider than the console, and the columns it does without.

    Lists stand on one line if there is room; else one item below the other, so that the rates of a
    pair of models stand beside the draft's name; then the least important columns go.
    """
    columns = list(table.shown)
    left_out: list[Column] = []
    drawn = _draw(table, columns, console.width, is_stacked=False)
    while _width(drawn, console) > console.width:
        drawn = _draw(table, columns, console.width, is_stacked=True)
        if _width(drawn, console) <= console.width:
            break
        least = max(columns, key=lambda column: column.rank)
        if not least.rank:  # what is left is folded
            break
        columns.remove(least)
        left_out.append(least)
    return drawn, left_out


def _draw(table: Table, columns: Sequence[Column], width: int, *, is_stacked: bool) -> RichTable:
    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if width >= _ROOMY_WIDTH else 0, 0, 0),
    )
    for column in columns:
        drawn.add_column(
            column.header.replace(" ", "\n"),
            justify="left" if column.is_text else "right",
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(
            *(
                ("\n" if is_stacked else NAMES_BETWEEN if column.is_text else " ").join(
                    column.cells(row)
                )
                for column in columns
            )
        )
    return drawn


def _width(drawn: RichTable, console: Console) -> int:
    """What it would take to write no cell on more lines than it has."""
    return Measurement.get(console, console.options.update(max_width=10_000), drawn).maximum
