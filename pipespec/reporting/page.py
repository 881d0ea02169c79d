"""The page: sections of tables and plots, and the data that its script shows sample by sample.

One file without anything to fetch: style, script and data are inside.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from pipespec.reporting.data import MAX_TEXT, Detail, Group, Row, Run, Sample, grouped
from pipespec.reporting.markup import Html, embedded, join, tag
from pipespec.reporting.plots import (
    MAX_BARS,
    accepted_histograms,
    lookahead_curves,
    progress_curves,
    speed_bars,
)
from pipespec.reporting.tables import config_details, machine_table, summary_table
from pipespec.results.labels import TOKEN_COLORS, run_color, run_label

MAX_DETAIL_BYTES: Final = 4_000_000  # of samples to choose from; a page of that size still opens
MARK: Final = '<meta name="generator" content="pipespec.report">'


@dataclass(frozen=True, slots=True)
class Page:
    """html: ASCII and UTF-8 alike; num_samples: that can be looked at."""

    html: str
    num_samples: int


def make_page(runs: Sequence[Run], skipped: Sequence[str]) -> Page:
    """The page of these runs. skipped: a line for each file that was passed over."""
    groups = grouped(runs)
    rows = [row for group in groups for row in group.rows]
    ordered = [row.run for row in rows]
    names_dataset = len({group.dataset for group in groups}) > 1
    data = _drill_down(rows, names_dataset)
    num_samples = sum(len(run["samples"]) for run in data["runs"])
    body = join(
        tag("h1", "PipeSpec report"),
        tag("p", _extent(groups, ordered)),
        _skipped(skipped),
        *map(_group_section, groups),
        _sample_section(num_samples, ordered),
        tag("section", tag("h2", "Machine"), machine_table(ordered)),
        tag("section", tag("h2", "Configuration"), *_configs(ordered, names_dataset)),
        embedded(data, "data"),
        tag("script", Html(_resource("page.js"))),
    )
    colors = "".join(f"--{name}:{color};" for name, color in TOKEN_COLORS.items())
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{MARK}<title>PipeSpec report</title>"
        f"<style>:root{{{colors}}}\n{_resource('page.css')}</style>"
    )
    main = tag("main", body)
    html = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{main}</body></html>\n'
    return Page(html, num_samples)


def _extent(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    num_samples = sum(len(run.samples) for run in runs)
    return (
        f"{_count(len(runs), 'run')}, {_count(num_samples, 'sample')}, "
        f"{_count(len(groups), 'pair')} of data set and target. "
        "Speed-ups compare with the greedy run of the same target on the same data set."
    )


def _skipped(lines: Sequence[str]) -> Html:
    if not lines:
        return Html("")
    summary = tag("summary", f"{_count(len(lines), 'file')} passed over")
    return tag("details", summary, tag("ul", *(tag("li", line) for line in lines)))


def _group_section(group: Group) -> Html:
    """Of many runs the fastest of each kind are shown first."""
    best = group.best()
    is_large = len(group.rows) > MAX_BARS
    shown = best if is_large else group.rows
    name = f"{group.dataset}, target {group.target}"
    charts = [chart for chart in (progress_curves(best), lookahead_curves(group)) if chart]
    return tag(
        "section",
        tag("h2", name),
        summary_table(shown, f"runs on {name}"),
        _all_runs(group, name) if is_large else "",
        tag(
            "div",
            tag("div", speed_bars(shown), accepted_histograms(best)),
            tag("div", *(tag("figure", embedded(chart), class_="chart") for chart in charts)),
            class_="plots",
        ),
    )


def _all_runs(group: Group, name: str) -> Html:
    note = "Above and drawn: the fastest lookahead of each strategy and models."
    return join(
        tag("p", note, class_="note"),
        tag(
            "details",
            tag("summary", f"All {len(group.rows)} runs"),
            summary_table(group.rows, f"all runs on {name}"),
        ),
    )


def _sample_section(num_samples: int, runs: Sequence[Run]) -> Html:
    total = sum(len(run.samples) for run in runs)
    notes = (
        [f"{num_samples:,} of {total:,} samples are on this page"] if num_samples < total else []
    )
    notes.append(f"texts are cut at {MAX_TEXT:,} characters")
    return tag(
        "section",
        tag("h2", "Sample by sample"),
        tag("noscript", tag("p", "Curves and samples need JavaScript; tables and bars do not.")),
        tag("p", f"{'; '.join(notes).capitalize()}.", class_="note"),
        Html(_resource("samples.html")),
        id="samples",
    )


def _configs(runs: Sequence[Run], names_dataset: bool) -> list[Html]:
    return [
        config_details(run, run_label(run.metadata, name_dataset=names_dataset)) for run in runs
    ]


def _drill_down(rows: Sequence[Row], names_dataset: bool) -> dict[str, Any]:
    """What the script shows: runs with their samples, each distinct text once, and the run to
    begin with. Samples are taken in turn, the first of each run, the second of each run, until the
    page is large enough."""
    runs = [row.run for row in rows]
    texts: dict[str, int] = {}
    chosen: list[list[dict[str, Any]]] = [[] for _ in runs]
    room = MAX_DETAIL_BYTES
    for position, sample in _in_turn(runs):
        assert sample.detail is not None
        new = {sample.detail.prompt, sample.detail.text} - texts.keys()
        entry = _entry(sample, texts)
        room -= sum(len(json.dumps(item)) for item in (entry, *new))
        if room < 0:
            break
        chosen[position].append(entry)
    places = {id(run): position for position, run in enumerate(runs)}
    return {
        "texts": list(texts),
        "start": max(range(len(rows)), key=lambda place: _interest(rows[place])),
        "runs": [
            {
                "label": run_label(row.run.metadata, name_dataset=names_dataset),
                "color": run_color(row.run.metadata),
                "greedy": None if row.greedy is None else places[id(row.greedy)],
                "samples": samples,
            }
            for row, samples in zip(rows, chosen)
        ],
    }


def _interest(row: Row) -> float:
    """What a reader wants to see first has verifications, and the largest speed-up."""
    if row.run.metadata["strategy"] == "greedy":
        return -1.0
    return (row.comparison and row.comparison.speed_up) or 0.0


def _in_turn(runs: Sequence[Run]) -> Iterator[tuple[int, Sample]]:
    details = [[sample for sample in run.samples if sample.detail is not None] for run in runs]
    for samples in itertools.zip_longest(*details):
        yield from ((place, sample) for place, sample in enumerate(samples) if sample is not None)


def _entry(sample: Sample, texts: dict[str, int]) -> dict[str, Any]:
    """A sample for the script; `texts` gets what it refers to."""
    detail, metrics = sample.detail, sample.result["metrics"]
    assert detail is not None
    return {
        "index": sample.result["sample_index"],
        "prompt": texts.setdefault(detail.prompt, len(texts)),
        "text": texts.setdefault(detail.text, len(texts)),
        "numCharacters": detail.num_characters,
        "numTokens": metrics["tokens_generated"],
        "seconds": round(metrics["total_time"], 4),
        "firstToken": _rounded(metrics.get("time_to_first_token_s"), 4),
        "finish": detail.finish_reason,
        "divergence": metrics.get("first_divergence"),
        "margin": metrics.get("divergence_margin"),
        "lengths": detail.token_lengths,
        "written": _written(detail),
        "curve": [(round(at_s, 3), count) for at_s, count in detail.curve],
        "isEstimated": detail.is_estimated,
        "utilization": [(round(at_s, 2), values) for at_s, values in detail.utilization],
    }


def _written(detail: Detail) -> dict[str, Any] | None:
    """Times in milliseconds."""
    written = detail.written
    if written is None:
        return None
    return {
        "before": written.num_before,
        "accepted": written.accepted,
        "own": written.own,
        "offered": written.offered,
        "ms": [round(1000 * duration_s, 2) for duration_s in written.durations_s],
        "ends": written.ends_s and [round(1000 * end_s, 1) for end_s in written.ends_s],
    }


def _rounded(value: float | None, num_digits: int) -> float | None:
    return None if value is None else round(value, num_digits)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _resource(name: str) -> str:
    return resources.files("pipespec.reporting").joinpath(name).read_text(encoding="utf-8")
