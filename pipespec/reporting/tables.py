"""The report's tables: every run by its numbers, the machines, and all that the files say of how
they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pipespec.reporting.data import Row, Run
from pipespec.reporting.markup import Html, join, tag
from pipespec.results.labels import lookahead_text, model_names, run_label

NOTHING: Final = "-"
# Headings, and what they mean where that is not plain.
_COLUMNS: Final = (
    ("strategy", ""),
    ("models", "smallest draft first, target last"),
    ("lookahead", "candidates to wait for before a verification"),
    ("samples", ""),
    ("ms/token", "all seconds by all tokens, prefill included"),
    ("tokens/s", "all tokens by all seconds, prefill included"),
    ("speed-up, same prompts", "over greedy, on the prompts that both have"),
    ("speed-up, as published", "over greedy, all samples of each, whichever they are"),
    ("acceptance rate", "accepted by scored candidates; a value a pair, the target's last"),
    ("block efficiency", "tokens a verification, the target's own included; a value a pair"),
    ("J/token", "by energy counter, else estimated from power samples of the run's GPUs"),
    ("utilization", "mean over the run's devices and its time"),
    ("same text as greedy", "of the prompts that both have"),
)
_FIRST_NUMBER: Final = 2
_OF_DEVICES: Final = ("J/token", "utilization")
_MACHINE: Final = ("host", "cpu", "platform", "commit", "pipespec_version", "versions")


def summary_table(rows: Sequence[Row], label: str) -> Html:
    """A row a run; the fastest is marked. Columns without a value are left out, and named below if
    they might have one."""
    fastest = max(rows, key=lambda row: row.summary.tokens_per_s or 0.0)
    cells = [_cells(row) for row in rows]
    known = [any(line[n] != NOTHING for line in cells) for n in range(len(_COLUMNS))]
    head = [
        tag("th", name, scope="col", title=hint or None, class_=_kind(index))
        for index, (name, hint) in enumerate(_COLUMNS)
        if known[index]
    ]
    body = [
        tag(
            "tr",
            tag("th", line[0], scope="row"),
            *(tag("td", line[n], class_=_kind(n)) for n in range(1, len(line)) if known[n]),
            class_="fastest" if row is fastest else None,
        )
        for row, line in zip(rows, cells)
    ]
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_="summary")
    has_drafts = any(row.run.metadata["strategy"] != "greedy" for row in rows)
    unknown = [
        name
        for (name, _), is_known in zip(_COLUMNS, known)
        if not is_known and (has_drafts or name in _OF_DEVICES)
    ]
    note = tag("p", f"Not known of these runs: {', '.join(unknown)}.", class_="note")
    return join(_scrolling(table, label), note if unknown else "")


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


def number(value: float | None, num_digits: int) -> str:
    """As text; a hyphen for what is not known."""
    return NOTHING if value is None else f"{value:,.{num_digits}f}"


def _cells(row: Row) -> tuple[str, ...]:
    """In the order of `_COLUMNS`."""
    summary, metadata = row.summary, row.run.metadata
    names = [tag("span", name, class_="name") for name in model_names(metadata)]
    return (
        metadata["strategy"],
        Html(" &gt; ".join(names)),
        lookahead_text(metadata),
        f"{summary.num_samples:,}",
        number(summary.ms_per_token, 2),
        number(summary.tokens_per_s, 1),
        _times(row.comparison and row.comparison.speed_up),
        _times(row.published_speed_up),
        _pairs(summary.acceptance_rate, 3),
        _pairs(summary.block_efficiency, 2),
        number(row.energy_per_token_j, 2),
        NOTHING if row.utilization is None else f"{row.utilization:.0f} %",
        _same_text(row),
    )


def _kind(column: int) -> str | None:
    return "number" if column >= _FIRST_NUMBER else None


def _same_text(row: Row) -> str:
    comparison = row.comparison
    if row.greedy is row.run or comparison is None or not comparison.num_matched:
        return NOTHING
    if comparison.differing:
        return f"{comparison.num_same_text} of {comparison.num_matched}"
    return f"yes, {comparison.num_matched}"


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


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"


def _pairs(values: Sequence[float | None], num_digits: int) -> str:
    if all(value is None for value in values):
        return NOTHING
    return " / ".join(number(value, num_digits) for value in values)


def _scrolling(table: Html, label: str) -> Html:
    """A wide table scrolls by itself, with the keyboard too."""
    return tag("div", table, class_="scroll", role="region", tabindex=0, aria_label=label)
