"""Draws result files side by side: tokens per second of each run and sample, speed-up over greedy.

    python -m viz.strategy_comparison results/stdlib --output comparison.png

Reads result files of PipeSpec and of the original, and folders of them; what is none is passed
over. A speed-up is taken on the prompts that a run shares with the greedy run of the same target on
the same data set; without such a run it has none. What is drawn comes from the files alone; no
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.arguments import Parser
from pipespec.commands.entry import run_command
from pipespec.metrics import SampleTotals, sample_totals, speed_up, summarise
from pipespec.results.labels import COLORS, OTHER_COLOR, comparison_key, run_label
from viz.utils import Run, check_output, read, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Bar:
    """One run as it is drawn. sample_rates: tokens/s of each sample; speed_up: None without a
    greedy run to compare with."""

    strategy: str
    label: str
    tokens_per_s: float
    sample_rates: tuple[float, ...]
    speed_up: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m viz.strategy_comparison",
        description="Draws tokens per second and speed-up of several runs side by side.",
    )
    parser.add_argument("paths", nargs="+", type=Path, help="result files, or folders of them")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("strategy-comparison.png"),
        help="the picture: .png, .pdf or .svg",
    )
    options = parser.parse_args(arguments)
    check_output(options.output)
    bars = read_bars(options.paths)
    save(draw(bars), options.output)
    print(f"{len(bars)} runs: {options.output}")
    return 0


def read_bars(paths: Iterable[Path]) -> list[Bar]:
    """One bar a run; strategies together, then by models and lookahead.

    Raises:
        NothingLeftError: no file could be used.
        DataError: a path does not exist.
    """
    runs = read(paths, sample_totals)
    baselines = {
        comparison_key(run.metadata): run for run in runs if run.metadata["strategy"] == "greedy"
    }
    num_datasets = len({run.metadata.get("dataset") for run in runs})
    return [
        _bar(run, baselines.get(comparison_key(run.metadata)), num_datasets > 1) for run in runs
    ]


def draw(bars: Sequence[Bar]) -> Figure:
    """Two panels of horizontal bars, in the order of `bars` from the top."""
    from matplotlib.figure import Figure

    width = 8.0 + 0.08 * max(len(bar.label) for bar in bars)
    figure = Figure(figsize=(width, 0.9 + 0.3 * len(bars)), layout="constrained")
    speeds, gains = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_speeds(speeds, bars)
    _draw_gains(gains, bars)
    return figure


def _draw_speeds(axes: Axes, bars: Sequence[Bar]) -> None:
    rows = range(len(bars))
    axes.barh(rows, [bar.tokens_per_s for bar in bars], color=_colors(bars), alpha=0.75)
    for row, bar in zip(rows, bars):
        places = [row] * len(bar.sample_rates)
        axes.plot(bar.sample_rates, places, "o", ms=3, color="black", alpha=0.35, mew=0)
    axes.set_yticks(rows, [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens/s (bar: whole run, dots: samples)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_gains(axes: Axes, bars: Sequence[Bar]) -> None:
    rows = [row for row, bar in enumerate(bars) if bar.speed_up is not None]
    gains = [bar.speed_up for bar in bars if bar.speed_up is not None]
    colors = [_colors(bars)[row] for row in rows]
    drawn = axes.barh(rows, gains, color=colors, alpha=0.75)
    axes.bar_label(drawn, fmt="%.2fx", padding=3)
    axes.axvline(1.0, color="black", lw=0.8, ls=":")
    axes.set_xlim(0, 1.15 * max(gains, default=1.0))
    axes.set_xlabel("speed-up over greedy, same prompts")
    axes.spines[["top", "right"]].set_visible(False)


def _colors(bars: Iterable[Bar]) -> list[str]:
    return [COLORS.get(bar.strategy, OTHER_COLOR) for bar in bars]


def _bar(run: Run[SampleTotals], baseline: Run[SampleTotals] | None, name_dataset: bool) -> Bar:
    return Bar(
        strategy=run.metadata["strategy"],
        label=run_label(run.metadata, name_dataset=name_dataset),
        tokens_per_s=run.num_tokens / run.total_time_s,
        sample_rates=tuple(
            rate for sample in run.samples if (rate := summarise([sample]).tokens_per_s) is not None
        ),
        speed_up=None if baseline is None else speed_up(run.samples, baseline.samples).speed_up,
    )


if __name__ == "__main__":
    sys.exit(main())
