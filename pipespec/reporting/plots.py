"""Bars and histograms as HTML with inline SVG, and the curves that the page's script draws.

Lengths are percentages, so that a plot is as wide as the window while its letters keep their size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from pipespec.metrics import summarise
from pipespec.reporting.data import Group, Row
from pipespec.reporting.markup import Html, tag
from pipespec.results.labels import lookahead, model_names, run_color, run_label

MAX_BARS: Final = 12  # of more runs than these, the fastest of each kind are drawn
# The original's bins: first and last number of tokens of each.
BINS: Final = (*((n, n) for n in range(1, 10)), (10, 14), (15, 19), (20, 24), (25, 29), (30, None))
# Told apart without colour, which is the strategy's.
_DASHES: Final = ("", "6 3", "2 3", "8 3 2 3")


def speed_bars(rows: Sequence[Row]) -> Html:
    """A bar a run, tokens/s of the whole, and a dot for each of its samples."""
    rates = [[_rate(result) for result in row.run.results] for row in rows]
    most = max([rate for samples in rates for rate in samples], default=0.0) or 1.0
    bars = []
    for row, samples in zip(rows, rates):
        speed = row.summary.tokens_per_s or 0.0
        dots = [tag("circle", cx=_percent(rate / most), cy="50%", r=2.5) for rate in samples]
        bar = tag("rect", height="100%", width=_percent(speed / most), fill=_color(row))
        bars += [
            tag("div", run_label(row.run.metadata), class_="label"),
            tag("svg", bar, *dots, class_="track", role="img", aria_label=f"{speed:.1f} tokens/s"),
            tag("div", f"{speed:,.1f}", class_="value"),
        ]
    scale = tag("div", tag("span", "0"), tag("span", f"{most:,.0f}"), class_="scale")
    bars += [tag("div", class_="label"), scale, tag("div", class_="value")]
    caption = "Tokens per second: bar, the whole run; dots, its samples"
    return tag("figure", tag("figcaption", caption), tag("div", *bars, class_="bars"))


def accepted_histograms(rows: Sequence[Row]) -> Html:
    """How many tokens each verification by the target brought, one panel a run; nothing if no run
    verifies."""
    panels = [_histogram(row) for row in rows if row.summary.acceptance_rate]
    if not panels:
        return Html("")
    caption = (
        "Tokens per verification by the target, its own bonus or correction token included: "
        "percent of all verifications"
    )
    return tag("figure", tag("figcaption", caption), tag("div", *panels, class_="panels"))


def shares(row: Row) -> list[float]:
    """Of the target's verifications, the share in each of `BINS`."""
    counts = Counter(
        count
        for result in row.run.results
        for count in result["metrics"]["accepted_tokens"][-1]
        if count > 0
    )
    total = counts.total() or 1
    return [
        sum(n for count, n in counts.items() if first <= count <= (last or count)) / total
        for first, last in BINS
    ]


def lookahead_curves(group: Group) -> dict[str, Any] | None:
    """Milliseconds per token over lookahead, where a strategy ran with several."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in group.rows:
        metadata = row.run.metadata
        if metadata["strategy"] != "greedy" and row.summary.ms_per_token is not None:
            lines.setdefault((metadata["strategy"], *model_names(metadata)), []).append(row)
    lines = {key: rows for key, rows in lines.items() if len(_lookaheads(rows)) > 1}
    if not lines:
        return None
    series = [
        _line(f"{strategy}, {' > '.join(names)}", rows[0], index, _points(rows))
        for index, ((strategy, *names), rows) in enumerate(lines.items())
    ]
    drawn = [row for rows in lines.values() for row in rows]
    first, last = _lookaheads(drawn)[0], _lookaheads(drawn)[-1]
    for row in group.rows:
        if row.run.metadata["strategy"] == "greedy" and row.summary.ms_per_token is not None:
            flat = [(first, row.summary.ms_per_token), (last, row.summary.ms_per_token)]
            series.insert(0, _line(run_label(row.run.metadata), row, 0, flat))
            break
    return {
        "title": "Time per token by lookahead",
        "x": "lookahead (tokens)",
        "y": "ms/token",
        "marks": True,
        "series": series,
    }


def progress_curves(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Tokens over time of the first sample that all of `rows` have in detail."""
    shared = set.intersection(*(_detailed(row) for row in rows)) if rows else set()
    if not shared:
        return None
    index = min(shared)
    series = []
    are_estimated = False
    for position, row in enumerate(rows):
        (sample,) = (s for s in row.run.samples if s.result["sample_index"] == index)
        assert sample.detail is not None
        are_estimated = are_estimated or sample.detail.is_estimated
        series.append(_line(run_label(row.run.metadata), row, position, sample.detail.curve))
    note = "; of runs that recorded no times of their verifications, estimated"
    return {
        "title": f"Tokens over time, sample {index}{note if are_estimated else ''}",
        "x": "seconds since the prompt was submitted",
        "y": "tokens",
        "series": series,
    }


def _histogram(row: Row) -> Html:
    values = shares(row)
    most = max(values) or 1.0
    width = 100 / len(BINS)
    bars, labels = [], []
    for index, ((first, last), value) in enumerate(zip(BINS, values)):
        name = str(first) if first == last else f"{first}+" if last is None else f"{first}-{last}"
        bars.append(
            tag(
                "rect",
                tag("title", f"{name} tokens: {100 * value:.1f} %"),
                x=f"{index * width + width * 0.1:.2f}%",
                width=f"{width * 0.8:.2f}%",
                y=_percent(1 - value / most),
                height=_percent(value / most),
                fill=_color(row),
            )
        )
        labels.append(tag("span", name[:2], tag("wbr"), name[2:]))
    return tag(
        "div",
        tag("div", run_label(row.run.metadata), class_="label"),
        tag("div", f"{100 * most:.0f} %", class_="most"),
        tag("svg", *bars, class_="histogram", role="img", aria_label="histogram"),
        tag("div", *labels, class_="bins"),
        class_="panel",
    )


def _line(
    label: str, row: Row, index: int, points: Sequence[tuple[float, float | None]]
) -> dict[str, Any]:
    rounded = [(round(x, 3), y if y is None else round(y, 3)) for x, y in points]
    return {
        "label": label,
        "color": _color(row),
        "dash": _DASHES[index % len(_DASHES)],
        "points": rounded,
    }


def _lookaheads(rows: Sequence[Row]) -> list[int]:
    return sorted({lookahead(row.run.metadata) for row in rows})


def _points(rows: Sequence[Row]) -> list[tuple[float, float | None]]:
    return sorted((lookahead(row.run.metadata), row.summary.ms_per_token) for row in rows)


def _detailed(row: Row) -> set[int]:
    return {s.result["sample_index"] for s in row.run.samples if s.detail is not None}


def _rate(result: dict[str, Any]) -> float:
    return summarise([result]).tokens_per_s or 0.0


def _color(row: Row) -> str:
    return run_color(row.run.metadata)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
