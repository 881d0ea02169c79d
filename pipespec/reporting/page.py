"""The page: sections of tables and plots, and the data that its script shows sample by sample.

One file without anything to fetch: style, script and data are inside.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final

from pipespec.reporting.data import MAX_TEXT, Detail, Run, RunGroup, Sample, device_names
from pipespec.reporting.markup import Html, embedded, join, tag
from pipespec.reporting.plots import (
    accepted_histograms,
    lookahead_curves,
    progress_curves,
    speed_bars,
)
from pipespec.reporting.tables import comparison_table, config_details, html_table, machine_table
from pipespec.reporting.verifications import without_corrections
from pipespec.results.labels import TOKEN_COLORS, dataset_name, run_color, run_label
from pipespec.statistics.tables import Table

MAX_DETAIL_BYTES: Final = 4_000_000  # of samples to choose from; a page of that size still opens


@dataclass(frozen=True, slots=True)
class Page:
    """num_samples: that can be looked at one by one."""

    html: str
    num_samples: int


def make_page(groups: Sequence[RunGroup], skipped: Sequence[str]) -> Page:
    """The page of these runs. skipped: a line for each file that was passed over."""
    runs = [run for group in groups for run in group.runs]
    names_dataset = len({dataset_name(run.metadata) for run in runs}) > 1
    labels = [run_label(run.metadata, name_dataset=names_dataset) for run in runs]
    data = _drill_down(groups, labels)
    num_samples = sum(len(run["samples"]) for run in data["runs"])
    body = join(
        tag("h1", "PipeSpec report"),
        tag("p", _extent(groups, runs)),
        _skipped(skipped),
        *map(_group_section, groups),
        _sample_section(num_samples, runs),
        tag("section", tag("h2", "Machine"), machine_table(runs)),
        tag("section", tag("h2", "Configuration"), *map(config_details, runs, labels)),
        embedded(data, "data"),
        tag("script", Html(_resource("page.js"))),
    )
    colors = "".join(f"--{name}:{color};" for name, color in TOKEN_COLORS.items())
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>PipeSpec report</title>"
        f"<style>:root{{{colors}}}\n{_resource('page.css')}</style>"
    )
    main = tag("main", body)
    html = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{main}</body></html>\n'
    return Page(html, num_samples)


def _extent(groups: Sequence[RunGroup], runs: Sequence[Run]) -> str:
    num_samples = sum(len(run.samples) for run in runs)
    tables = f", in {len(groups)} tables of runs that can be compared" if len(groups) > 1 else ""
    return f"{_count(len(runs), 'run')}, {_count(num_samples, 'sample')}{tables}."


def _skipped(lines: Sequence[str]) -> Html:
    if not lines:
        return Html("")
    summary = tag("summary", f"{_count(len(lines), 'file')} passed over")
    return tag("details", summary, tag("ul", *(tag("li", line) for line in lines)))


def _group_section(group: RunGroup) -> Html:
    """Of runs that differ in their lookahead only, the fastest are shown and drawn; all others are
    in a table that opens."""
    charts = [chart for chart in (progress_curves(group.shown), lookahead_curves(group)) if chart]
    table = comparison_table(group)
    return tag(
        "section",
        tag("h2", group.group.title),
        html_table(table, group.shown),
        _all_runs(group, table),
        tag(
            "div",
            tag("div", speed_bars(group.shown), accepted_histograms(group.shown)),
            tag("div", *(tag("figure", embedded(chart), class_="chart") for chart in charts)),
            class_="plots",
        ),
    )


def _all_runs(group: RunGroup, table: Table) -> Html:
    if len(group.shown) == len(group.runs):
        return Html("")
    return tag(
        "details",
        tag("summary", f"All {len(group.runs)} runs (above: the fastest lookahead of each)"),
        html_table(replace(table, notes=()), group.runs),
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


def _drill_down(groups: Sequence[RunGroup], labels: Sequence[str]) -> dict[str, Any]:
    """What the script shows: runs with their samples, each distinct text once, and the run to
    begin with. Samples are taken in turn, the first of each run, the second of each run, until the
    page is large enough."""
    pairs = [(group, run) for group in groups for run in group.runs]
    runs = [run for _, run in pairs]
    texts: dict[str, int] = {}
    chosen: list[list[dict[str, Any]]] = [[] for _ in runs]
    room = MAX_DETAIL_BYTES
    for place, sample, detail in _in_turn(runs):
        new = {detail.prompt, detail.text} - texts.keys()
        entry = _entry(sample, detail, bool(runs[place].metadata.get("tree")), texts)
        room -= sum(len(json.dumps(item)) for item in (entry, *new))
        if room < 0:
            break
        chosen[place].append(entry)
    places = {run.path: place for place, run in enumerate(runs)}
    baselines = [group.greedy_of(run) for group, run in pairs]
    return {
        "texts": list(texts),
        "start": max(range(len(runs)), key=lambda place: _interest(runs[place])),
        "runs": [
            {
                "label": label,
                "color": run_color(run.metadata),
                "greedy": None if greedy is None else places[greedy.path],
                "devices": device_names(run.metadata, _num_devices(samples)),
                "samples": samples,
            }
            for run, label, greedy, samples in zip(runs, labels, baselines, chosen)
        ],
    }


def _interest(run: Run) -> float:
    """What a reader wants to see first has verifications, and the largest speed-up."""
    comparison = run.compared.comparison
    if run.is_greedy:
        return -1.0
    return comparison.speed_up or 0.0 if comparison else 0.0


def _num_devices(samples: Sequence[Mapping[str, Any]]) -> int:
    lists = [values for sample in samples for _, values in sample["utilization"]]
    return max(map(len, lists), default=0)


def _in_turn(runs: Sequence[Run]) -> Iterator[tuple[int, Sample, Detail]]:
    """The place of a run, and one of its samples."""
    for samples in itertools.zip_longest(*(run.samples for run in runs)):
        for place, sample in enumerate(samples):
            if sample is not None and sample.detail is not None:
                yield place, sample, sample.detail


def _entry(
    sample: Sample, detail: Detail, has_branches: bool, texts: dict[str, int]
) -> dict[str, Any]:
    """A sample for the script; `texts` gets what it refers to."""
    totals = sample.accepted.totals
    return {
        "index": totals.sample_index,
        "prompt": texts.setdefault(detail.prompt, len(texts)),
        "text": texts.setdefault(detail.text, len(texts)),
        "numCharacters": detail.num_characters,
        "numTokens": totals.num_tokens,
        "seconds": round(totals.total_time_s, 4),
        "firstToken": _rounded(totals.time_to_first_token_s, 4),
        "finish": detail.finish_reason,
        "divergence": detail.divergence,
        "margin": detail.margin,
        "lengths": detail.token_lengths,
        "written": _written(detail, has_branches),
        "curve": detail.curve,
        "isEstimated": detail.is_estimated,
        "utilization": detail.utilization,
    }


def _written(detail: Detail, has_branches: bool) -> dict[str, Any] | None:
    """Times in milliseconds."""
    written = detail.written
    if written is None:
        return None
    return {
        "before": written.num_before,
        "accepted": written.accepted,
        "own": without_corrections(written.own) if has_branches else written.own,
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
