"""The report on a terminal: 80 columns, a mark for each finding, and what to do below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipespec.checkup.findings import Finding, Mark, Section, count

WIDTH: Final = 80
_STYLES: Final[Mapping[Mark, tuple[str, str]]] = {
    Mark.OK: ("ok", "green"),
    Mark.WARNING: ("warning", "yellow"),
    Mark.PROBLEM: ("PROBLEM", "bold red"),
}


def show_section(console: Console, section: Section) -> None:
    """A title and the findings."""
    console.print(Text(section.title, style="bold"))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=7, justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in section.findings:
        label, style = _STYLES[finding.mark]
        grid.add_row(Text(label, style=style), _body(finding))
    console.print(grid, width=min(WIDTH, console.width))
    console.print()


def show_steps(console: Console, where: str, rows: Sequence[Sequence[str]]) -> None:
    """The times of runner paths; columns as of `table_rows`."""
    console.print(Text(f"Time of a step on {where} in ms, by query length", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True, max_width=16)
    table.add_column("path", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for header in ("q = 1", "2", "4", "8", "floor", "1/floor"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("tokens as hf", justify="right", overflow="fold")
    previous = ""
    for model, *cells in rows:
        table.add_row(*map(Text, ("" if model == previous else model, *cells)))
        previous = model
    console.print(table, width=min(WIDTH, console.width))
    console.print()


def show_not_run(console: Console, not_run: Mapping[str, str]) -> None:
    """Paths that were not run, by reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in not_run.items():
        by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        text = Text(f"not run ({reason}): {'; '.join(paths)}", style="dim")
        console.print(text, width=min(WIDTH, console.width))
    if by_reason:
        console.print()


def verdict(sections: Sequence[Section]) -> str:
    """The last line."""
    problems, warnings = count(sections, Mark.PROBLEM), count(sections, Mark.WARNING)
    if not problems and not warnings:
        return "Everything is in order."
    parts = [
        f"{number} {noun}{'' if number == 1 else 's'}"
        for number, noun in ((problems, "problem"), (warnings, "warning"))
        if number
    ]
    return " and ".join(parts) + "."


def _body(finding: Finding) -> Text:
    text = Text(finding.text)
    if finding.remedy:
        text.append(f"\n-> {finding.remedy}", style="italic")
    return text
