"""Tables as CSV, JSON, Markdown and LaTeX. Text for a terminal is in `text`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Final

from pipespec.statistics.tables import NAMES_BETWEEN, Column, Row, Table, Value

_LATEX: Final = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "\n": " ",
        **{character: rf"\{character}" for character in "&%$#_{}"},
    }
)
_MARKDOWN: Final = str.maketrans(
    {"\n": " ", **{character: f"\\{character}" for character in "\\`*_<|"}}
)


def to_csv(tables: Sequence[Table]) -> str:
    """Tables with the same columns are one, with a line of names; others follow after an empty
    line. A value a pair of models is a list with spaces between."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    former: list[str] = []
    for table in tables:
        names = [*table.about, *(column.name for column in table.columns)]
        if names != former:
            if former:
                out.write("\n")
            writer.writerow(names)
            former = names
        for row in table.rows:
            cells = [_csv_cell(column, row[column.name]) for column in table.columns]
            writer.writerow([*table.about.values(), *cells])
    return out.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """A list of tables: `title`, what the rows have in common, `rows` by name, and `notes`."""
    content = [
        {
            "title": table.title,
            **table.about,
            "rows": [
                {column.name: row[column.name] for column in table.columns} for row in table.rows
            ],
            "notes": table.notes,
        }
        for table in tables
    ]
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def to_markdown(tables: Sequence[Table]) -> str:
    """GitHub's tables, with the title above and the notes below."""
    return "\n".join(_markdown(table) for table in tables)


def to_latex(tables: Sequence[Table]) -> str:
    """A `table` environment each, with the rules of booktabs."""
    return "\n".join(["% needs \\usepackage{booktabs}", *map(_latex, tables)])


def _markdown(table: Table) -> str:
    columns = table.shown
    lines = [f"**{table.title.translate(_MARKDOWN)}**", ""]
    lines.append(_markdown_line(column.header for column in columns))
    lines.append(_markdown_line("---" if column.is_text else "---:" for column in columns))
    for row in table.rows:
        lines.append(_markdown_line(_joined(column, row) for column in columns))
    lines += ["", *(f"- {note.translate(_MARKDOWN)}" for note in table.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.translate(_MARKDOWN) for cell in cells)} |"


def _latex(table: Table) -> str:
    columns = table.shown
    alignment = "".join("l" if column.is_text else "r" for column in columns)
    rows = [[_joined(column, row) for column in columns] for row in table.rows]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_text(table.title)}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        _latex_line([column.header for column in columns]),
        r"\midrule",
        *map(_latex_line, rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par {_latex_text(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex_text, cells)) + r" \\"


def _latex_text(text: str) -> str:
    """Escaped. After the end of a row, [ and * would be taken for arguments; two hyphens for a
    dash."""
    escaped = text.translate(_LATEX).replace("--", "-{}-")
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def _joined(column: Column, row: Row) -> str:
    return (NAMES_BETWEEN if column.is_text else " ").join(column.cells(row))


def _csv_cell(column: Column, value: Value) -> str | int | float | None:
    if isinstance(value, tuple):
        between = NAMES_BETWEEN if column.is_text else " "
        return between.join("" if item is None else str(item) for item in value)
    return value
