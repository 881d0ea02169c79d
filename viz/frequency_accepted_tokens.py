"""Draws how many tokens a verification of the target brings: a histogram in percent.

    python viz/frequency_accepted_tokens.py RESULTS_FOLDER

A verification emits what it accepts and one token of its own, the bonus or correction token; both
count, as in `accepted_tokens` of the files. Steps that a verdict overtook are left out. A panel a
data set and target; of the runs that differ in lookahead alone, the fastest, unless `--all`. More
than six runs are drawn as a table in colours.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from pipespec.errors import NothingLeftError
from pipespec.results.labels import run_label, short_names
from viz.utils import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    Look,
    Run,
    add_head,
    by_target,
    fastest,
    looks,
    make_parser,
    open_output,
    read,
    strategy_and_models,
    style,
    usable,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS: Final = 6  # runs whose bars can stand beside each other
FEW_BARS: Final = 3  # at the width of a column
TOKENS_LABEL: Final = "tokens a verification (with the target's own)"


@dataclass(frozen=True, slots=True)
class Bin:
    """Verifications that emit `low` to `high` tokens; high: None has no end."""

    low: int
    high: int | None

    @property
    def label(self) -> str:
        if self.high is None:
            return f"{self.low}+"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    def __contains__(self, num_tokens: int) -> bool:
        return self.low <= num_tokens and (self.high is None or num_tokens <= self.high)


@dataclass(frozen=True, slots=True)
class Values:
    """What a panel shows: a number a run and bin; None where a run has nothing there."""

    bins: tuple[Bin, ...]
    values: tuple[tuple[float | None, ...], ...]
    labels: tuple[str, ...]
    looks: tuple[Look, ...]

    @staticmethod
    def of(
        runs: Sequence[Run[Any]],
        in_picture: Sequence[Run[Any]],
        bins: Sequence[Bin],
        values: Sequence[Sequence[float | None]],
    ) -> Values:
        """The values of `runs`, looking and called as among all that are `in_picture`."""
        look = looks(run.metadata for run in in_picture)
        names = short_names(run.metadata for run in in_picture)
        return Values(
            tuple(bins),
            tuple(map(tuple, values)),
            tuple(wrapped(run_label(run.metadata, names=names)) for run in runs),
            tuple(look(run.metadata) for run in runs),
        )


# The original's.
BINS: Final = (
    *(Bin(number, number) for number in range(1, 10)),
    *(Bin(low, low + 4) for low in range(10, 30, 5)),
    Bin(30, None),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser(
        "frequency_accepted_tokens",
        "Draws how often a verification of the target brings how many tokens.",
    )
    parser.add_argument("--all", action="store_true", help="every run, not only the fastest")
    options = parser.parse_args(arguments)
    output = open_output(options)
    runs = speculative(read(options.paths, count_tokens))
    with style():
        figure = draw(runs if options.all else fastest(runs, strategy_and_models))
    output.save(figure, "token-frequency-distribution")
    return 0


def count_tokens(result: Mapping[str, Any]) -> Counter[int]:
    """Verifications of the target by the number of tokens that each emitted; none in greedy."""
    if "accepted_tokens" not in result["metrics"]:
        return Counter()
    emitted = result["metrics"]["accepted_tokens"][-1]
    return Counter(count for count in emitted if count > 0)


def speculative(runs: Sequence[Run[Any]]) -> list[Run[Any]]:
    """Without greedy runs, which verify nothing.

    Raises:
        NothingLeftError: none is left.
    """
    drafting = [run for run in runs if run.metadata["strategy"] != "greedy"]
    if not drafting:
        raise NothingLeftError("these are greedy runs, which verify nothing")
    return usable(drafting, lambda run: None if any(run.samples) else "has no verification")


def bins_up_to(most: int) -> tuple[Bin, ...]:
    """Bins for values up to `most`."""
    return tuple(found for found in BINS if found.low <= most)


def shares(run: Run[Counter[int]], bins: Sequence[Bin]) -> list[float]:
    """Percent of a run's verifications in each bin."""
    total = sum(run.samples, Counter())
    num_verifications = total.total()
    return [
        100 * sum(number for count, number in total.items() if count in found) / num_verifications
        for found in bins
    ]


def draw(runs: Sequence[Run[Counter[int]]]) -> Figure:
    """A panel a data set and target, one below the other."""
    from matplotlib.figure import Figure

    panels = by_target(runs)
    of_panels = {title: histogram(found, runs) for title, found in panels.items()}
    heights = [panel_height(shown) for shown in of_panels.values()]
    figure = Figure(figsize=(figure_width(panels), sum(heights)))
    rows = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, shown) in zip(rows, of_panels.items()):
        draw_values(axes, shown, title, "verifications (%)")
    rows[-1].set_xlabel(TOKENS_LABEL)
    return figure


def figure_width(panels: Mapping[str, Sequence[Run[Any]]]) -> float:
    """Inches: that of a column for a few bars, else that of a page."""
    few = len(panels) == 1 and all(len(found) <= FEW_BARS for found in panels.values())
    return COLUMN_WIDTH if few else PAGE_WIDTH


def panel_height(shown: Values) -> float:
    """Inches, legend or rows included."""
    num_runs = len(shown.labels)
    num_lines = sum(label.count("\n") + 1 for label in shown.labels)
    return 2.0 + 0.08 * num_lines if num_runs <= MOST_BARS else 0.7 + 0.16 * num_lines


def histogram(runs: Sequence[Run[Counter[int]]], in_picture: Sequence[Run[Any]]) -> Values:
    """Of the runs of a panel. in_picture: all that must be told apart."""
    bins = bins_up_to(max(max(sample, default=0) for run in runs for sample in run.samples))
    return Values.of(runs, in_picture, bins, [shares(run, bins) for run in runs])


def draw_values(axes: Axes, shown: Values, title: str, what: str) -> None:
    """Bars beside each other, or, of many runs, a table in colours. No title: nor a legend."""
    if len(shown.values) <= MOST_BARS:
        _draw_bars(axes, shown)
        axes.set_ylabel(what)
        if title:
            add_head(axes, title, 1 if axes.figure.get_figwidth() < PAGE_WIDTH else 2)  # type: ignore[union-attr]
    else:
        _draw_table(axes, shown)
        axes.set_title(f"{title}: {what}" if title else what)
    axes.set_xticks(range(len(shown.bins)), [found.label for found in shown.bins])


def _draw_bars(axes: Axes, shown: Values) -> None:
    width = 0.84 / len(shown.values)
    for number, (values, label, look) in enumerate(zip(shown.values, shown.labels, shown.looks)):
        shift = (number - (len(shown.values) - 1) / 2) * width
        axes.bar(
            [place + shift for place in range(len(values))],
            [value or 0.0 for value in values],
            width,
            label=label,
            color=look.color,
            hatch=look.hatch,
            edgecolor="black",
            linewidth=0.3,
        )
    axes.grid(visible=False, axis="x")


def _draw_table(axes: Axes, shown: Values) -> None:
    table = [[float("nan") if value is None else value for value in row] for row in shown.values]
    axes.imshow(table, aspect="auto", cmap="cividis", vmin=0)
    largest = max(value for row in shown.values for value in row if value is not None)
    digits = 0 if largest >= 20 else 1 if largest >= 2 else 2
    for y, row in enumerate(shown.values):
        for x, value in enumerate(row):
            text = "" if value is None else f"{value:.{digits}f}"
            if value is not None and float(text) > 0:
                color = "white" if value < 0.6 * largest else "black"
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize="x-small")
    axes.set_yticks(range(len(shown.labels)), shown.labels)
    axes.grid(visible=False)


if __name__ == "__main__":
    sys.exit(main())
