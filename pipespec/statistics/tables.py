"""Tables as data: columns with exact names and units, rows of plain values, notes below them.

A column is for people if it has a header; files for programs have all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

Value = str | int | float | tuple[str, ...] | tuple[float | None, ...] | None
Row = Mapping[str, Value]

NOTHING: Final = "-"
NAMES_BETWEEN: Final = " > "


@dataclass(frozen=True, slots=True)
class Column:
    """name: in files for programs, with the unit. header: for people, of one or more words; "" for
    programs only. digits: of its floats, after the point. unit: follows each number. rank: of those
    that may be left out where there is no room, the highest goes first; 0 stays. show: its text
    for people, of the whole row, where that is not the value itself."""

    name: str
    header: str = ""
    digits: int = 0
    unit: str = ""
    rank: int = 0
    is_text: bool = False
    show: Callable[[Row], str] | None = None

    def cells(self, row: Row) -> tuple[str, ...]:
        """The text of a value; of a tuple, one an item."""
        if self.show is not None:
            return (self.show(row),)
        value = row[self.name]
        items = value if isinstance(value, tuple) else (value,)
        return tuple(map(self._text, items)) or (NOTHING,)

    def is_empty(self, rows: tuple[Row, ...]) -> bool:
        """Whether no row has a value."""
        return all(
            row[self.name] in (None, ()) or set(self.cells(row)) == {NOTHING} for row in rows
        )

    def _text(self, value: str | int | float | None) -> str:
        if value is None:
            return NOTHING
        if isinstance(value, str):
            return value
        return f"{value:,.{self.digits if isinstance(value, float) else 0}f}{self.unit}"


@dataclass(frozen=True, slots=True)
class Table:
    """about: what all rows have in common, by name; the first columns of files for programs.
    notes: sentences for people, one a line. short_names: for long ones in text columns, where there
    is little room."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    about: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    short_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> tuple[Column, ...]:
        """The columns for people, without those that have nothing to show."""
        return tuple(
            column for column in self.columns if column.header and not column.is_empty(self.rows)
        )
