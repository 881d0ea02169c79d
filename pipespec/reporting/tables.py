"""The report's tables: every run by its numbers, the machines, and all that the files say of how
they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pipespec.reporting.data import Run, RunGroup
from pipespec.reporting.markup import Html, join, tag
from pipespec.results.labels import run_label
from pipespec.statistics.comparison import comparison_tables
from pipespec.statistics.tables import NOTHING, Column, Row, Table

_MACHINE: Final = ("host", "cpu", "platform", "commit", "pipespec_version", "versions")
_UTILIZATION: Final = Column("utilization_percent", "utilization", unit=" %")


def comparison_table(group: RunGroup) -> Table:
    """The table of `print_benchmark_stats` for all runs, with the utilization of their devices."""
    (table,) = comparison_tables([group.group], show_all=True)
    utilization = {str(run.path): run.utilization for run in group.runs}
    rows = tuple({**row, _UTILIZATION.name: utilization[str(row["file"])]} for row in table.rows)
    return replace(table, columns=(*table.columns, _UTILIZATION), rows=rows)


def html_table(table: Table, runs: Sequence[Run]) -> Html:
    """The rows of some runs; the fastest is marked. The notes stand below."""
    files = {str(run.path) for run in runs}
    rows = [row for row in table.rows if row["file"] in files]
    columns = table.shown
    fastest = max(rows, key=_tokens_per_s)
    head = [tag("th", column.header, scope="col", class_=_kind(column)) for column in columns]
    body = [
        tag(
            "tr",
            tag("th", *_cell(columns[0], row), scope="row"),
            *(tag("td", *_cell(column, row), class_=_kind(column)) for column in columns[1:]),
            class_="fastest" if row is fastest else None,
        )
        for row in rows
    ]
    made = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_="summary")
    notes = [tag("li", note) for note in table.notes]
    return join(_scrolling(made, table.title), tag("ul", *notes, class_="note") if notes else "")


def machine_table(runs: Sequence[Run]) -> Html:
    """The machines and versions that the files name, with the runs of each."""
    by_machine: dict[str, list[Run]] = {}
    for run in runs:
        known = {key: run.metadata[key] for key in _MACHINE if run.metadata.get(key)}
        by_machine.setdefault(json.dumps(known, sort_keys=True), []).append(run)
    blocks = []
    for text, members in by_machine.items():
        which = "all runs" if len(by_machine) == 1 else _which(members)
        facts = list(_flat("", json.loads(text)))
        if facts:
            blocks += [tag("h3", which), _facts(facts, which)]
        else:
            blocks.append(tag("p", f"The files do not say where they were made: {which}."))
    return tag("div", *blocks)


def config_details(run: Run, label: str) -> Html:
    """Models and every other key of the metadata, folded under the run's label."""
    others = {
        key: value
        for key, value in run.metadata.items()
        if key not in ("model_configs", *_MACHINE) and value is not None
    }
    return tag(
        "details",
        tag("summary", label),
        tag("p", "File: ", tag("code", run.path)),
        _models(run),
        _facts(list(_flat("", others)), "settings"),
    )


def _cell(column: Column, row: Row) -> list[Html]:
    """The items of a value, of which none is broken over lines."""
    between = Html(" &gt; ") if column.is_text else Html(" / ")
    items = [tag("span", text, class_="item") for text in column.cells(row)]
    return [part for item in items for part in (between, item)][1:]


def _kind(column: Column) -> str | None:
    return None if column.is_text else "number"


def _tokens_per_s(row: Row) -> float:
    value = row["tokens_per_s"]
    return value if isinstance(value, float) else 0.0


def _models(run: Run) -> Html:
    """A row a model, a column a key that one of them has."""
    models = run.metadata["model_configs"]
    keys = list(dict.fromkeys(key for model in models for key in model))
    head = [tag("th", key, scope="col") for key in keys]
    rows = [tag("tr", *(tag("td", _text(model.get(key))) for key in keys)) for model in models]
    return _scrolling(tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows)), "models")


def _facts(facts: Sequence[tuple[str, str]], label: str) -> Html:
    rows = [tag("tr", tag("th", key, scope="row"), tag("td", value)) for key, value in facts]
    return _scrolling(tag("table", tag("tbody", *rows), class_="facts"), label)


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of nested objects joined by dots, in order."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(f"{prefix}{key}.", value)
        elif value is not None:
            yield f"{prefix}{key}", _text(value)


def _text(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _which(runs: Sequence[Run]) -> str:
    labels = "; ".join(run_label(run.metadata, name_dataset=True) for run in runs[:3])
    return labels + (f"; and {len(runs) - 3} more" if len(runs) > 3 else "")


def _scrolling(table: Html, label: str) -> Html:
    """A wide table scrolls by itself, with the keyboard too."""
    return tag("div", table, class_="scroll", role="region", tabindex=0, aria_label=label)
