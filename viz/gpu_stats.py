"""Draws what runs took of their devices: power, utilization, energy, and what they gave for it.

    python viz/gpu_stats.py RESULTS_FOLDER

A row a run; of those that differ in lookahead alone, the fastest, unless `--all`. Power is that of
all devices of a run together, utilization their mean. Energy is what the devices' counters said,
and in files without them the mean power times the time (`metrics.energy_estimate_j`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from pipespec.metrics import SampleTotals, energy_estimate_j, sample_totals
from pipespec.results.labels import Metadata, run_label, short_names, stage_devices
from viz.utils import (
    PAGE_WIDTH,
    Look,
    Run,
    by_target,
    fastest,
    looks,
    make_parser,
    number,
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

COLUMNS: Final[Mapping[str, str]] = {
    "power_w": "power\n(W)",
    "utilization": "utilization\n(%)",
    "energy_j": "energy\n(J/sample)",
    "tokens_per_s": "throughput\n(tokens/s)",
    "energy_per_token_j": "energy\n(J/token)",
}
_ROOM_FOR_NUMBERS: Final = 1.75
_BAR_HEIGHT: Final = 0.19


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a run. power_w, utilization: means over its time. energy_j: of a sample on average. None
    where it is not known."""

    power_w: float | None
    utilization: float | None
    energy_j: float | None
    tokens_per_s: float
    energy_per_token_j: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """A sample. stage_utilizations: the percentages that PipeSpec's files have of each stage, over
    time; the original's readings came at equal intervals, so that their mean is that."""

    totals: SampleTotals
    stage_utilizations: tuple[float | None, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser(
        "gpu_stats", "Draws power, utilization, energy and throughput of runs beside each other."
    )
    parser.add_argument("--all", action="store_true", help="every run, not only the fastest")
    options = parser.parse_args(arguments)
    output = open_output(options)
    runs = usable(read(options.paths, measured), _problem)
    with style():
        figure = draw(runs if options.all else fastest(runs, strategy_and_models))
    output.save(figure, "gpu-analysis")
    return 0


# -- numbers --------------------------------------------------------------------------------


def measured(result: Mapping[str, Any]) -> Measured:
    """What is kept of a sample."""
    found = result["metrics"].get("mean_utilization") or ()
    return Measured(sample_totals(result), tuple(found))


def usage(run: Run[Measured]) -> Usage:
    """What a run took of its devices."""
    busy, powered = devices_of(run)
    known = [
        (energy_j, sample.totals.num_tokens)
        for sample in run.samples
        if (energy_j := _energy_j(sample.totals, powered)) is not None
    ]
    energy_j, num_tokens = sum(joules for joules, _ in known), sum(tokens for _, tokens in known)
    utilizations = _known(
        _over_time(run, lambda s: s.stage_utilizations, stage)
        for stage in range(max(len(sample.stage_utilizations) for sample in run.samples))
    ) or _known(_over_time(run, lambda s: s.totals.gpu_utilizations, index) for index in busy)
    powers_w = _known(_over_time(run, lambda s: s.totals.gpu_powers_w, index) for index in powered)
    return Usage(
        power_w=sum(powers_w) if powers_w else None,
        utilization=sum(utilizations) / len(utilizations) if utilizations else None,
        energy_j=energy_j / len(known) if known else None,
        tokens_per_s=run.num_tokens / run.total_time_s,
        energy_per_token_j=energy_j / num_tokens if num_tokens else None,
    )


def devices_of(run: Run[Measured]) -> tuple[list[int], list[int]]:
    """Indexes of the devices that a run kept busy, and of those that say what power it took. Where
    its models' are not known, all that there are."""
    own = sorted({index for devices in stage_devices(run.metadata) for index in devices})
    if not own:
        num_devices = max(len(sample.totals.gpu_utilizations) for sample in run.samples)
        return list(range(num_devices)), list(range(num_devices))
    kinds = _kinds(run.metadata)
    gpus = [index for index in own if kinds.get(index) != "process"]
    packages = [index for index, kind in kinds.items() if kind == "cpu-package"]
    return own, gpus if len(gpus) == len(own) else [*gpus, *packages]


def _problem(run: Run[Measured]) -> str | None:
    found = usage(run)
    if found.power_w is None and found.utilization is None and found.energy_j is None:
        return "has no gpustats of its devices"
    return None


def _kinds(metadata: Metadata) -> dict[int, str]:
    """What the monitor's devices are, by index; empty for files that know only GPUs."""
    monitor = metadata.get("monitor")
    devices = monitor.get("devices") if isinstance(monitor, Mapping) else None
    return {index: str(device["kind"]) for index, device in enumerate(devices or ())}


def _energy_j(sample: SampleTotals, gpus: Sequence[int]) -> float | None:
    return energy_estimate_j([sample], gpus) if sample.energy_j is None else sample.energy_j


def _over_time(
    run: Run[Measured], values: Callable[[Measured], Sequence[float | None]], index: int
) -> float | None:
    """The mean of one value over the samples that have it, each as long as it took."""
    known = [
        (found[index], sample.totals.total_time_s)
        for sample in run.samples
        if index < len(found := values(sample))
    ]
    weighted = [(value, seconds) for value, seconds in known if value is not None]
    total_s = sum(seconds for _, seconds in weighted)
    return sum(value * seconds for value, seconds in weighted) / total_s if total_s else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# -- picture --------------------------------------------------------------------------------


def draw(runs: Sequence[Run[Measured]]) -> Figure:
    """A block of rows a data set and target, a column a quantity that is known of any run."""
    from matplotlib.figure import Figure

    blocks = by_target(runs)
    look = looks(run.metadata for run in runs)
    names = short_names(run.metadata for run in runs)
    usages = {run.path: usage(run) for run in runs}
    shown = [name for name in COLUMNS if any(getattr(u, name) is not None for u in usages.values())]
    labels = {run.path: wrapped(run_label(run.metadata, names=names), 44) for run in runs}
    num_lines = max(label.count("\n") + 1 for label in labels.values())
    heights = [len(found) + 0.2 for found in blocks.values()]
    height = (_BAR_HEIGHT + 0.12 * (num_lines - 1)) * sum(heights) + 0.36 * len(blocks) + 0.5
    figure = Figure(figsize=(PAGE_WIDTH, height))
    grid = figure.subplots(
        len(blocks), len(shown), squeeze=False, sharex="col", sharey="row", height_ratios=heights
    )
    for row, (title, found) in zip(grid, blocks.items()):
        for axes, name in zip(row, shown):
            values = [getattr(usages[run.path], name) for run in found]
            _draw_bars(axes, values, [look(run.metadata) for run in found])
        row[0].set_yticks(range(len(found)), [labels[run.path] for run in found])
        row[0].set_ylim(len(found) - 0.4, -0.6)
        _add_title(row[0], title)
    for column, name in zip(grid.T, shown):
        largest = max(v for u in usages.values() if (v := getattr(u, name)) is not None)
        column[0].set_xlim(0, _ROOM_FOR_NUMBERS * max(largest, 1e-3))
        column[-1].set_xlabel(COLUMNS[name])
    return figure


def _add_title(axes: Axes, title: str) -> None:
    """Above the row's first panel, which must not become as wide as its title."""
    axes.set_title(" ")  # takes the room
    text = axes.annotate(
        title, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points"
    )
    text.set_in_layout(False)


def _draw_bars(axes: Axes, values: Sequence[Any], all_looks: Sequence[Look]) -> None:
    bars = axes.barh(
        range(len(values)),
        [value or 0.0 for value in values],
        0.75,
        color=[look.color for look in all_looks],
        edgecolor="black",
        linewidth=0.3,
    )
    for bar, look in zip(bars, all_looks):
        bar.set_hatch(look.hatch)
    texts = ["-" if value is None else number(value) for value in values]
    axes.bar_label(bars, texts, padding=2, fontsize="small")
    axes.grid(visible=False, axis="y")
    axes.tick_params(left=False)


if __name__ == "__main__":
    sys.exit(main())
