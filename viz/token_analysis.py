"""Draws how often a verification of the target brings how many tokens, and what each token costs.

    python viz/token_analysis.py RESULTS_FOLDER

Above, the histogram of `frequency_accepted_tokens`. Below, for the same bins, the target's time in
these steps divided by the tokens that they emitted: what waits and drafts cost is not in it.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from viz.frequency_accepted_tokens import (
    TOKENS_LABEL,
    Bin,
    count_tokens,
    draw_values,
    figure_width,
    histogram,
    panel_height,
    speculative,
)
from viz.utils import (
    Run,
    by_target,
    fastest,
    make_parser,
    open_output,
    read,
    strategy_and_models,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Seconds = dict[int, float]  # of the target's steps that emitted so many tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser(
        "token_analysis",
        "Draws how often a verification of the target brings how many tokens, and the target's "
        "time for each of them.",
    )
    parser.add_argument("--all", action="store_true", help="every run, not only the fastest")
    options = parser.parse_args(arguments)
    output = open_output(options)
    runs = speculative(read(options.paths, count_and_time))
    with style():
        figure = draw(runs if options.all else fastest(runs, strategy_and_models))
    output.save(figure, "token-analysis")
    return 0


def count_and_time(result: Mapping[str, Any]) -> tuple[Counter[int], Seconds] | None:
    """Verifications by the number of tokens that each emitted, and the seconds of their steps; None
    in greedy."""
    counts = count_tokens(result)
    if not counts:
        return None
    metrics = result["metrics"]
    seconds: Seconds = defaultdict(float)
    # An overtaken step emitted nothing. The original's logs may end one verification early.
    for emitted, step_s in zip(metrics["accepted_tokens"][-1], metrics["model_times"][-1]):
        if emitted > 0:
            seconds[emitted] += float(step_s)
    return counts, dict(seconds)


def ms_per_token(
    samples: Sequence[tuple[Counter[int], Seconds] | None], bins: Sequence[Bin]
) -> list[float | None]:
    """Milliseconds of the target's steps for each token that they emitted, by bin; None where no
    step falls into it."""
    counts: Counter[int] = Counter()
    seconds: Seconds = defaultdict(float)
    for sample_counts, sample_seconds in filter(None, samples):
        counts.update(sample_counts)
        for count, step_s in sample_seconds.items():
            seconds[count] += step_s
    values: list[float | None] = []
    for found in bins:
        total_s = sum(seconds[count] for count in seconds if count in found)
        num_tokens = sum(count * number for count, number in counts.items() if count in found)
        values.append(total_s / num_tokens * 1000 if num_tokens else None)
    return values


def _counts_of(run: Run[tuple[Counter[int], Seconds] | None]) -> Run[Counter[int]]:
    counts = tuple(sample[0] if sample else Counter[int]() for sample in run.samples)
    return Run(run.path, run.metadata, counts, run.num_tokens, run.total_time_s)


def draw(runs: Sequence[Run[tuple[Counter[int], Seconds] | None]]) -> Figure:
    """Two panels a data set and target, one below the other."""
    from matplotlib.figure import Figure

    panels = by_target(runs)
    counts = {title: [_counts_of(run) for run in found] for title, found in panels.items()}
    histograms = {title: histogram(found, runs) for title, found in counts.items()}
    heights = [panel_height(shown) for shown in histograms.values() for _ in range(2)]
    figure = Figure(figsize=(figure_width(panels), sum(heights)))
    rows = figure.subplots(2 * len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for place, (title, found) in enumerate(panels.items()):
        shown = histograms[title]
        times = replace(
            shown, values=tuple(tuple(ms_per_token(run.samples, shown.bins)) for run in found)
        )
        draw_values(rows[2 * place], shown, title, "verifications (%)")
        draw_values(rows[2 * place + 1], times, "", "target's step (ms/token)")
    rows[-1].set_xlabel(TOKENS_LABEL)
    return figure


if __name__ == "__main__":
    sys.exit(main())
