"""Draws any metric over any flag: a line for each strategy, models and whatever else differs.

    python viz/sweep.py RESULTS_FOLDER --metric tokens_per_s --over lookahead

The flag is a key of the files' metadata; `sampling.temperature` is a key in a key. A panel a data
set and target. Greedy has no schedule: over one of its flags it is a level line. A chosen lookahead
(`auto`) is a larger mark at its mean, apart from the lines. The metrics are those of
`metrics.runs.Summary`; of pairs of stages, the target's. The best point of a line is filled, and
named in the legend.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from pipespec.errors import NothingLeftError, UsageError
from pipespec.metrics import SampleTotals, Summary, sample_totals, summarise
from pipespec.results.labels import Metadata, model_names, models_label, short_names
from pipespec.results.metadata import DEFINING
from viz.utils import (
    Look,
    Run,
    add_head,
    by_target,
    groups,
    looks,
    make_panels,
    make_parser,
    number,
    open_output,
    pass_over,
    read,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS: Final = tuple(
    sorted([*(field.name for field in dataclasses.fields(Summary)), "ms_per_token"])
)
_LESS_IS_BETTER: Final = (
    *("ms_per_token", "time_per_token_s", "total_time_s", "time_to_first_token_s", "overhead"),
    *("energy_per_token_j", "num_target_forwards", "token_wastage"),
)
# What greedy has not, so that its speed does not depend on it.
_SCHEDULE: Final = ("lookahead", "policy", "run_ahead", "outcomes", "tree", "drop_stages")
# What a line may differ in beside strategy and models: not what a panel or a run is made of.
_SETTINGS: Final = tuple(
    key
    for key in (*DEFINING, "deterministic")
    if key not in ("schema_version", "strategy", "model_configs", "lookahead_mode", "dataset")
    and key not in ("dataset_digest", "num_samples")
)


@dataclass(frozen=True, slots=True)
class Point:
    """A run. place: the value of the flag; is_chosen: it was left to the policy."""

    place: Any
    value: float
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class Line:
    """Runs that differ in the flag alone, sorted by it. is_level: the flag is nothing to them."""

    label: str
    look: Look
    points: tuple[Point, ...]
    is_level: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """A data set and target."""

    title: str
    lines: tuple[Line, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser("sweep", "Draws any metric of result files over any flag of their runs.")
    parser.add_argument(
        "--metric", default="tokens_per_s", metavar="NAME", help=f"of {', '.join(METRICS)}"
    )
    parser.add_argument(
        "--over",
        default="lookahead",
        metavar="KEY",
        help="of the metadata, as run_ahead, outcomes, tree, max_new_tokens, sampling.temperature",
    )
    options = parser.parse_args(arguments)
    metric, over = options.metric.replace("-", "_"), options.over.replace("-", "_")
    check_metric(metric)
    output = open_output(options)
    panels = read_panels(read(options.paths, sample_totals), metric, over)
    with style():
        figure = draw(panels, metric, over)
    output.save(figure, f"{metric}-over-{over}".replace("_", "-"))
    return 0


def check_metric(metric: str) -> None:
    """Whether there is such a metric.

    Raises:
        UsageError: there is none; names those that there are.
    """
    if metric not in METRICS:
        raise UsageError(f"--metric is {metric}; it must be one of {', '.join(METRICS)}")


# -- numbers --------------------------------------------------------------------------------


def read_panels(runs: Sequence[Run[SampleTotals]], metric: str, over: str) -> list[Panel]:
    """All lines that have a point, panel by panel; a panel without a point over the flag is none.

    Raises:
        NothingLeftError: no run has both the metric and the flag.
    """
    names = short_names(run.metadata for run in runs)
    keys = {key for run in runs for key in settings(run.metadata)} - {over, f"{over}_mode"}
    varying = sorted(key for key in keys if _varies(runs, key))
    look = looks([run.metadata for run in runs], lambda metadata: _kind(metadata, varying))
    panels: list[Panel] = []
    for title, found in by_target(runs).items():
        alike = groups(found, lambda run: (run.metadata["strategy"], _kind(run.metadata, varying)))
        lines = [
            _line(group, metric, over, _label(group[0].metadata, names, varying), look)
            for group in alike.values()
        ]
        lines = [line for line in lines if line.points]
        if any(not line.is_level for line in lines):
            panels.append(Panel(title, tuple(lines)))
    if not panels:
        known = sorted({key for run in runs for key in settings(run.metadata)})
        raise NothingLeftError(
            f"no run has both {metric} and {over}; flags of these runs are {', '.join(known)}"
        )
    return panels


def settings(metadata: Metadata) -> dict[str, Any]:
    """What of the metadata says how a run was made, keys in keys written with a dot. What is None
    was no choice of that run."""
    found: dict[str, Any] = {}
    for key in _SETTINGS:
        value = metadata.get(key)
        if isinstance(value, dict):
            found.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            found[key] = value
    return {key: value for key, value in found.items() if value is not None}


def value_of(metadata: Metadata, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = metadata
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value) if isinstance(value, list | dict | bool) else value


def metric_of(summary: Summary, metric: str) -> float | None:
    """A number; of pairs of stages, the target's."""
    value = getattr(summary, metric)
    if isinstance(value, tuple):
        value = value[-1] if value else None
    return None if value is None else float(value)


def _varies(runs: Sequence[Run[Any]], key: str) -> bool:
    """Whether runs of one strategy and models on one data set differ in a setting."""
    seen = groups(
        runs, lambda run: (run.metadata["strategy"], *by_target([run]), model_names(run.metadata))
    )
    return any(
        len({str(settings(run.metadata).get(key)) for run in found}) > 1 for found in seen.values()
    )


def _kind(metadata: Metadata, varying: Sequence[str]) -> tuple[Any, ...]:
    own = settings(metadata)
    return (model_names(metadata), *(str(own.get(key)) for key in varying))


def _label(metadata: Metadata, names: dict[str, str], varying: Sequence[str]) -> str:
    own = settings(metadata)
    parts = [f"{metadata['strategy']}, {models_label(metadata, names)}"]
    parts += [f"{key.split('.')[-1]} {own[key]}" for key in varying if key in own]
    return ", ".join(parts).replace("_", " ")


def _line(runs: Sequence[Run[SampleTotals]], metric: str, over: str, label: str, look: Any) -> Line:
    metadata = runs[0].metadata
    is_level = metadata["strategy"] == "greedy" and over.split(".")[0] in _SCHEDULE
    points: list[Point] = []
    for run in runs:
        value = metric_of(summarise(run.samples), metric)
        place = 0 if is_level else value_of(run.metadata, over)
        if place is None and value is not None:
            pass_over(f"passed over: {run.path} has no {over}")
        elif value is not None:
            chosen = over == "lookahead" and run.metadata.get("lookahead_mode") == "auto"
            points.append(Point(place, value, chosen))
    points.sort(key=lambda point: (isinstance(point.place, str), point.place))
    return Line(label, look(metadata), tuple(points), is_level)


# -- picture --------------------------------------------------------------------------------


def draw(panels: Sequence[Panel], metric: str, over: str) -> Figure:
    """Two panels beside each other."""
    most = max(len(panel.lines) for panel in panels)
    figure, all_axes = make_panels(len(panels), 2.2 + 0.14 * most)
    for axes, panel in zip(all_axes, panels):
        _draw_panel(axes, panel, best=min if metric in _LESS_IS_BETTER else max)
        add_head(axes, panel.title)
        axes.set_xlabel(axis_label(over))
        axes.set_ylabel(axis_label(metric))
    return figure


def axis_label(name: str) -> str:
    """A metric or a flag with its unit."""
    for ending, unit in (("_per_token_s", "s/token"), ("_per_token_j", "J/token")):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)} ({unit})"
    if name in ("ms_per_token", "tokens_per_s"):
        return name.replace("_per_", "/")
    if name.endswith("_s"):
        return f"{name.removesuffix('_s').replace('_', ' ')} (s)"
    return name.replace("_", " ").replace(".", ": ")


def _draw_panel(axes: Axes, panel: Panel, best: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    places = [p.place for line in panel.lines if not line.is_level for p in line.points]
    names = sorted({str(place) for place in places}, key=_as_number)
    is_numeric = not any(isinstance(place, str) for place in places)
    for line in panel.lines:
        if line.is_level:
            for point in line.points:
                label = f"{line.label}: {number(point.value)}"
                axes.axhline(point.value, color=line.look.color, ls="--", label=label, zorder=1)
            continue
        x = [p.place if is_numeric else names.index(str(p.place)) for p in line.points]
        _draw_line(axes, line, x, best)
    if is_numeric:
        if all(type(place) is int for place in places):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if min(places) == max(places):
            axes.set_xlim(places[0] - 2, places[0] + 2)
        axes.margins(x=0.08)
    else:
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)


def _draw_line(axes: Axes, line: Line, places: Sequence[float], best: Any) -> None:
    look = line.look
    for is_chosen in (False, True):
        shown = [(x, p) for x, p in zip(places, line.points) if p.is_chosen == is_chosen]
        if not shown:
            continue
        best_x, best_point = best(shown, key=lambda item: item[1].value)
        label = f"{line.label}{', auto' if is_chosen else ''}: "
        axes.plot(
            [x for x, _ in shown],
            [p.value for _, p in shown],
            color=look.color,
            ls="" if is_chosen else look.line,
            marker=look.marker,
            ms=7 if is_chosen else None,
            mfc="white",
            label=f"{label}{number(best_point.value)} at {best_point.place}",
        )
        axes.plot(
            best_x,
            best_point.value,
            marker=look.marker,
            ms=7 if is_chosen else None,
            color=look.color,
        )


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


if __name__ == "__main__":
    sys.exit(main())
