"""Bars and histograms as HTML with inline SVG, and the curves that the page's script draws.

Lengths are percentages, so that a plot is as wide as the window while its letters keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pipespec.metrics.definitions import tokens_per_second
from pipespec.reporting.data import Detail, Run, RunGroup, Sample
from pipespec.reporting.markup import Html, tag
from pipespec.results.labels import lookahead, lookahead_text, model_names, run_color, run_label

Points = Sequence[tuple[float, float]]

# The original's bins: first and last number of tokens of each.
BINS: Final = (*((n, n) for n in range(1, 10)), (10, 14), (15, 19), (20, 24), (25, 29), (30, None))
# Told apart without colour, which is the strategy's.
_DASHES: Final = ("", "6 3", "2 3", "8 3 2 3")


def speed_bars(runs: Sequence[Run]) -> Html:
    """A bar a run, tokens/s of the whole, and a dot for each of its samples."""
    rates = [[rate for sample in run.samples if (rate := _rate(sample))] for run in runs]
    most = max([rate for samples in rates for rate in samples], default=1.0)
    bars = []
    for run, samples in zip(runs, rates):
        speed = f"{run.tokens_per_s:,.1f}"
        dots = [tag("circle", cx=_percent(rate / most), cy="50%", r=2.5) for rate in samples]
        length = _percent(run.tokens_per_s / most)
        bar = tag("rect", height="100%", width=length, fill=run_color(run.metadata))
        bars += [
            tag("div", run_label(run.metadata), class_="label"),
            tag("svg", bar, *dots, class_="track", role="img", aria_label=f"{speed} tokens/s"),
            tag("div", speed, class_="value"),
        ]
    scale = tag("div", tag("span", "0"), tag("span", f"{most:,.0f}"), class_="scale")
    bars += [tag("div", class_="label"), scale, tag("div", class_="value")]
    caption = "Tokens per second: bar, the whole run; dots, its samples"
    return tag("figure", tag("figcaption", caption), tag("div", *bars, class_="bars"))


def accepted_histograms(runs: Sequence[Run]) -> Html:
    """How many tokens each verification by the target brought, one panel a run; nothing if no run
    verifies."""
    panels = [_histogram(run) for run in runs if run.emitted]
    if not panels:
        return Html("")
    caption = (
        "Tokens per verification by the target, its own bonus or correction token included: "
        "percent of all verifications"
    )
    return tag("figure", tag("figcaption", caption), tag("div", *panels, class_="panels"))


def shares(run: Run) -> list[float]:
    """Of the target's verifications, the share in each of `BINS`."""
    counts = run.emitted
    total = counts.total() or 1
    return [
        sum(n for count, n in counts.items() if first <= count <= (last or count)) / total
        for first, last in BINS
    ]


def lookahead_curves(group: RunGroup) -> dict[str, Any] | None:
    """Milliseconds per token over lookahead, where a strategy ran with several that were set; the
    fastest run of each."""
    lines: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in group.runs:
        metadata = run.metadata
        if not run.is_greedy and lookahead_text(metadata) != "auto":
            key = (metadata["strategy"], *model_names(metadata))
            known = lines.setdefault(key, {})
            place = lookahead(metadata)
            if place not in known or run.tokens_per_s > known[place].tokens_per_s:
                known[place] = run
    drawn = {key: runs for key, runs in lines.items() if len(runs) > 1}
    if not drawn:
        return None
    series = [
        _line(
            f"{key[0]}, {' > '.join(key[1:])}",
            next(iter(runs.values())),
            index,
            [(place, _ms_per_token(run)) for place, run in sorted(runs.items())],
        )
        for index, (key, runs) in enumerate(drawn.items())
    ]
    places = [place for runs in drawn.values() for place in runs]
    greedy = next((run for run in group.runs if run.is_greedy), None)
    if greedy is not None:
        flat = [(place, _ms_per_token(greedy)) for place in (min(places), max(places))]
        series.insert(0, _line(run_label(greedy.metadata), greedy, 0, flat))
    return {
        "title": "Time per token by lookahead",
        "x": "lookahead (tokens)",
        "y": "ms/token",
        "marks": True,
        "series": series,
    }


def progress_curves(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Tokens over time of the first sample that all of `runs` have in detail."""
    details = [_details(run) for run in runs]
    shared = set.intersection(*map(set, details)) if details else set()
    if not shared:
        return None
    index = min(shared)
    chosen = [of_run[index] for of_run in details]
    are_estimated = any(detail.is_estimated for detail in chosen)
    note = "; of runs that recorded no times of their verifications, estimated"
    return {
        "title": f"Tokens over time, sample {index}{note if are_estimated else ''}",
        "x": "seconds since the prompt was submitted",
        "y": "tokens",
        "series": [
            _line(run_label(run.metadata), run, place, detail.curve)
            for place, (run, detail) in enumerate(zip(runs, chosen))
        ],
    }


def _histogram(run: Run) -> Html:
    values = shares(run)
    most = max(values)
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
                fill=run_color(run.metadata),
            )
        )
        labels.append(tag("span", name[:2], Html("<wbr>"), name[2:]))
    label = f"of the verifications brought so many tokens: {run_label(run.metadata)}"
    return tag(
        "div",
        tag("div", run_label(run.metadata), class_="label"),
        tag("div", f"{100 * most:.0f} %", class_="most"),
        tag("svg", *bars, class_="histogram", role="img", aria_label=label),
        tag("div", *labels, class_="bins"),
        class_="panel",
    )


def _line(label: str, run: Run, index: int, points: Points) -> dict[str, Any]:
    return {
        "label": label,
        "color": run_color(run.metadata),
        "dash": _DASHES[index % len(_DASHES)],
        "points": [(round(x, 4), round(y, 3)) for x, y in points],
    }


def _details(run: Run) -> dict[int, Detail]:
    """By sample index."""
    return {s.accepted.totals.sample_index: s.detail for s in run.samples if s.detail is not None}


def _ms_per_token(run: Run) -> float:
    return run.compared.summary.ms_per_token or 0.0


def _rate(sample: Sample) -> float | None:
    totals = sample.accepted.totals
    return tokens_per_second(totals.total_time_s, totals.num_tokens)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
