"""Draws what the devices did while one text was written: utilization, power, memory over time.

    python viz/gpu_usage_analysis.py RESULTS_FOLDER --sample 1 --seconds 20

A row a strategy, the fastest run of each data set and target (`--all`: every run); a line a device,
called by the model that it had. All lines of a row are of one sample.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from pipespec.errors import DataError, NothingLeftError, UsageError
from pipespec.results.labels import (
    Metadata,
    model_names,
    run_label,
    short_names,
    stage_devices,
)
from viz.utils import (
    PAGE_WIDTH,
    Run,
    by_target,
    fastest,
    make_parser,
    open_output,
    pass_over,
    read,
    read_sample,
    sample_index,
    style,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

SECONDS: Final = 45.0  # the original's
QUANTITIES: Final[Mapping[str, str]] = {
    "gpu_utilizations": "utilization (%)",
    "gpu_powers": "power (W)",
    "gpu_memories": "memory (%)",
}
# Of models, the first draft first: Okabe and Ito's colours that no strategy has.
_COLORS: Final = ("#56b4e9", "#d55e00", "#009e73", "#cc79a7")
_LINES: Final = ("-", "--", ":", "-.")
_UNUSED_COLOR: Final = "#7f7f7f"
_PANEL_HEIGHT: Final = 1.4
_LINE_HEIGHT: Final = 0.17
_TITLE_CHARACTERS: Final = 110  # that are as wide as a page

Series = list[tuple[float, float]]  # seconds, value


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a run. series: by the names in `QUANTITIES`."""

    label: str
    color: str
    line: str
    series: dict[str, Series]


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of one run. seconds: to be shown."""

    title: str
    devices: tuple[Device, ...]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser(
        "gpu_usage_analysis",
        "Draws utilization, power and memory of the devices while one text was written.",
    )
    parser.add_argument(
        "--sample", type=int, metavar="INDEX", help="of the data set (default: the first of all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="from the sample's begin"
    )
    parser.add_argument("--all", action="store_true", help="every run, not only the fastest")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds is {options.seconds:g}; it must be a number above 0")
    output = open_output(options)
    runs = read(options.paths, sample_index)
    chosen = runs if options.all else fastest(runs, lambda metadata: metadata["strategy"])
    rows = read_rows(chosen, options.sample, options.seconds)
    with style():
        figure = draw(rows)
    output.save(figure, "gpu-usage-analysis")
    return 0


# -- numbers --------------------------------------------------------------------------------


def read_rows(runs: Sequence[Run[int]], sample: int | None, seconds: float) -> list[Row]:
    """One sample of each run; those of a data set and target beside each other, on one time axis.

    Raises:
        NothingLeftError: no run has the sample, or none has anything to show of it.
    """
    names = short_names(run.metadata for run in runs)
    colors = _colors_of_models(runs)
    rows: list[Row] = []
    for title, group in by_target(runs).items():
        index, found = read_sample(group, sample, gpustats_of)
        longest_s = max((stats[-1]["timestamp"] for _, stats in found), default=0.0)
        for run, stats in found:
            devices = devices_of(run.metadata, stats, names, colors)
            if devices:
                head = f"{title}, sample {index}: {run_label(run.metadata, names=names)}"
                rows.append(Row(head, devices, min(seconds, longest_s)))
            else:
                pass_over(f"passed over: {run.path} has no gpustats of its devices")
    if not rows:
        raise NothingLeftError("no run has gpustats of its devices for this sample; see --sample")
    return rows


def gpustats_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The readings of a sample, in the order of time; what is no list is left out.

    Raises:
        DataError: there are fewer than two.
    """
    stats = [
        {"timestamp": float(reading["timestamp"])}
        | {name: reading[name] for name in QUANTITIES if isinstance(reading.get(name), list)}
        for reading in result["gpustats"]
    ]
    if len(stats) < 2:
        raise DataError(f"has {len(stats)} gpustats in sample {result['sample_index']}")
    return sorted(stats, key=lambda reading: reading["timestamp"])


def devices_of(
    metadata: Metadata,
    stats: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    colors: Mapping[str, str],
) -> tuple[Device, ...]:
    """The devices that the models of a run had; all of them where that is not known."""
    found: list[Device] = []
    stages = stage_devices(metadata)
    for model, devices in zip(model_names(metadata), stages):
        for number, index in enumerate(devices):
            name, series = device_name(metadata, index), series_of(stats, index)
            label = f"{names[model]}: {name}"
            if found and name == "process" and series == found[-1].series:  # one has both models
                label = f"{found.pop().label.removesuffix(f': {name}')} and {label}"
            found.append(Device(label, colors[model], _LINES[number % len(_LINES)], series))
    taken = {index for devices in stages for index in devices}
    num_devices = max(len(reading.get(name, ())) for reading in stats for name in QUANTITIES)
    for number, index in enumerate(i for i in range(num_devices) if i not in taken):
        if not taken or _kind(metadata, index) == "cpu-package":
            line = _LINES[number % len(_LINES)]
            series = series_of(stats, index)
            found.append(Device(device_name(metadata, index), _UNUSED_COLOR, line, series))
    return tuple(device for device in found if any(device.series.values()))


def _colors_of_models(runs: Sequence[Run[Any]]) -> dict[str, str]:
    """A color a model, drafts first where a run has several."""
    longest_first = sorted((model_names(run.metadata) for run in runs), key=len, reverse=True)
    models = dict.fromkeys(name for names in longest_first for name in names)
    return {model: _COLORS[place % len(_COLORS)] for place, model in enumerate(models)}


def series_of(stats: Sequence[Mapping[str, Any]], index: int) -> dict[str, Series]:
    """What was read of a device. A reading that lacks it, or where it is None, is a gap."""
    found: dict[str, Series] = {name: [] for name in QUANTITIES}
    for reading in stats:
        for name, series in found.items():
            values = reading.get(name, [])
            value = values[index] if index < len(values) else None
            if isinstance(value, int | float):
                series.append((reading["timestamp"], float(value)))
    return found


def device_name(metadata: Metadata, index: int) -> str:
    """ "GPU 1", "CPU" for the processor's power meter, "process" for a stage without a device."""
    kind = _kind(metadata, index)
    if kind == "cpu-package":
        return "CPU"
    return "process" if kind == "process" else f"GPU {index}"


def _kind(metadata: Metadata, index: int) -> str:
    monitor = metadata.get("monitor")
    devices = monitor.get("devices") if isinstance(monitor, Mapping) else None
    if isinstance(devices, list) and index < len(devices) and isinstance(devices[index], Mapping):
        return str(devices[index].get("kind"))
    return "gpu"


# -- picture --------------------------------------------------------------------------------


def draw(rows: Sequence[Row]) -> Figure:
    """A row a run, a column for each quantity that is known of any."""
    from matplotlib.figure import Figure

    shown = [
        name for name in QUANTITIES if any(d.series[name] for row in rows for d in row.devices)
    ]
    heights = [_PANEL_HEIGHT + _LINE_HEIGHT * _num_head_lines(row) for row in rows]
    figure = Figure(figsize=(PAGE_WIDTH, sum(heights)))
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=heights)[:, 0]
    for part, row in zip(parts, rows):
        _draw_row(part, row, shown)
    return figure


def _since_the_reading_before(
    series: Sequence[tuple[float, float]],
) -> tuple[list[float], list[float]]:
    """Times and values for steps: a reading tells of the time since the one before it. What the
    first one tells of was before the sample."""
    times_s, values = [time_s for time_s, _ in series], [value for _, value in series]
    return times_s, [*values[1:2], *values[1:]] or values


def _draw_row(part: SubFigure, row: Row, shown: Sequence[str]) -> None:
    for axes, name in zip(part.subplots(1, len(shown), squeeze=False)[0], shown):
        for device in row.devices:
            times_s, values = _since_the_reading_before(device.series[name])
            looks = {"color": device.color, "ls": device.line, "label": device.label}
            axes.plot(times_s, values, drawstyle="steps-pre", **looks)
        axes.set_xlim(0, row.seconds)
        largest = max((v for d in row.devices for _, v in d.series[name]), default=1.0)
        axes.set_ylim(0, 104 if name == "gpu_utilizations" else 1.08 * max(largest, 1e-3))
        axes.set_xlabel("time (s)")
        axes.set_ylabel(QUANTITIES[name])
    handles, labels = axes.get_legend_handles_labels()
    part.legend(
        handles,
        labels,
        title=wrapped(row.title, _TITLE_CHARACTERS),
        loc="outside upper center",
        ncols=_num_columns(row),
    )


def _num_columns(row: Row) -> int:
    """Of the legend."""
    return max(1, _TITLE_CHARACTERS // (8 + max(len(device.label) for device in row.devices)))


def _num_head_lines(row: Row) -> int:
    """Of title and legend."""
    title = wrapped(row.title, _TITLE_CHARACTERS)
    return title.count("\n") + 1 - (-len(row.devices) // _num_columns(row))


if __name__ == "__main__":
    sys.exit(main())
