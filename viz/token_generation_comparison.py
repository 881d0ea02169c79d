"""Draws how the tokens of one text come: their number over time, by each strategy.

    python viz/token_generation_comparison.py RESULTS_FOLDER --sample 1

A panel a data set and target; of the runs that differ in lookahead alone, the fastest. Files of
PipeSpec say when tokens arrived. The original's say how long steps took, so that its curves are
put together: the end is exact, in the middle waits are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from pipespec.errors import NothingLeftError
from pipespec.results.labels import run_label, short_names
from viz.utils import (
    Look,
    Run,
    add_head,
    by_target,
    fastest,
    looks,
    make_panels,
    make_parser,
    open_output,
    pass_over,
    read,
    read_sample,
    sample_index,
    strategy_and_models,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arrivals = list[tuple[float, int]]  # seconds since the request, tokens until then


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's text."""

    label: str
    look: Look
    arrivals: Arrivals


@dataclass(frozen=True, slots=True)
class Panel:
    """A data set and target; all curves are of the same prompt."""

    title: str
    curves: tuple[Curve, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser(
        "token_generation_comparison",
        "Draws the number of tokens over time while one text is written, by each strategy.",
    )
    parser.add_argument(
        "--sample", type=int, metavar="INDEX", help="of the data set (default: the first of all)"
    )
    options = parser.parse_args(arguments)
    output = open_output(options)
    runs = fastest(read(options.paths, sample_index), strategy_and_models)
    panels = read_panels(runs, options.sample)
    with style():
        figure = draw(panels)
    output.save(figure, "token-generation-comparison")
    return 0


def read_panels(runs: Sequence[Run[int]], sample: int | None) -> list[Panel]:
    """Curves by data set and target; one alone only if there is nothing to compare at all.

    Raises:
        NothingLeftError: no run has the sample.
    """
    names = short_names(run.metadata for run in runs)
    look = looks(run.metadata for run in runs)
    panels: list[Panel] = []
    for title, group in by_target(runs).items():
        index, found = read_sample(group, sample, lambda result: arrivals(result["metrics"]))
        curves = tuple(
            Curve(run_label(run.metadata, names=names), look(run.metadata), kept)
            for run, kept in found
        )
        if curves:
            panels.append(Panel(f"{title}, sample {index}", curves))
    if not panels:
        raise NothingLeftError(f"no run has sample {sample}; name another with --sample")
    alone = [panel for panel in panels if len(panel.curves) == 1]
    if len(alone) == len(panels):
        return panels
    for panel in alone:
        pass_over(f"passed over: {panel.title} has nothing to compare {panel.curves[0].label} with")
    return [panel for panel in panels if panel not in alone]


def arrivals(metrics: Mapping[str, Any]) -> Arrivals:
    """When the tokens of a sample came.

    Of the original's: greedy logged each token but the first, which therefore came when nothing
    else had. Others logged each verification that brought tokens after the first: `chain` drafts
    before each of them, and logged the texts' end beyond their last token; `async-chain` did not
    log its last one, and what it waited. What no step accounts for is put before the first token.
    """
    total_s, num_tokens = float(metrics["total_time"]), int(metrics["tokens_generated"])
    if num_tokens == 0:
        raise ValueError("has no token")
    if "arrivals" in metrics:
        times_s = [float(time_s) for time_s, _ in metrics["arrivals"]]
        return list(zip(times_s, accumulate(int(count) for _, count in metrics["arrivals"])))
    if "token_times" in metrics:
        steps_s, counts = list(metrics["token_times"]), [1] * len(metrics["token_times"])
    else:
        steps_s, counts = _verifications(metrics)
    known = 1 + sum(counts)
    if known < num_tokens:  # the last step is missing
        steps_s.append(sum(steps_s) / len(steps_s) if steps_s else 0.0)
        counts.append(num_tokens - known)
    scale = min(1.0, total_s / sum(steps_s)) if sum(steps_s) else 1.0
    first_s = max(0.0, total_s - sum(steps_s))
    times_s = [first_s + scale * step_s for step_s in accumulate(steps_s, initial=0.0)]
    numbers = [min(number, num_tokens) for number in accumulate(counts, initial=1)]
    times_s[-1], numbers[-1] = total_s, num_tokens
    return list(zip(times_s, numbers))


def _verifications(metrics: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    """Seconds and tokens of each verification by the target; the time of drafts that ran one after
    the other with it is shared equally."""
    counts = [int(count) for count in metrics["accepted_tokens"][-1]]
    steps_s = [float(step_s) for step_s in metrics["model_times"][-1][: len(counts)]]
    logged_s = sum(sum(times_s) for times_s in metrics["model_times"])
    if logged_s <= metrics["total_time"] and steps_s:  # one at a time
        share_s = (logged_s - sum(steps_s)) / len(steps_s)
        steps_s = [step_s + share_s for step_s in steps_s]
    return steps_s, counts[: len(steps_s)]


def draw(panels: Sequence[Panel]) -> Figure:
    """Two panels beside each other."""
    most = max(len(panel.curves) for panel in panels)
    figure, all_axes = make_panels(len(panels), 2.2 + 0.14 * most)
    for axes, panel in zip(all_axes, panels):
        for curve in panel.curves:
            times_s, numbers = zip(*[(0.0, 0), *curve.arrivals])
            axes.plot(
                times_s,
                numbers,
                drawstyle="steps-post",
                color=curve.look.color,
                ls=curve.look.line,
                marker=curve.look.marker,
                markevery=[len(numbers) - 1],
                label=curve.label,
            )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds since the request")
        axes.set_ylabel("tokens")
        add_head(axes, panel.title)
    return figure


if __name__ == "__main__":
    sys.exit(main())
