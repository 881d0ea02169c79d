"""Draws who did what when: a lane a model, and what was rejected in another colour.

    python viz/pipeline_timeline.py TRACE_OR_RESULTS... [--sample N] [--start S --end S]

From a trace (`--trace` of the benchmark and of run_example) the strategies that it holds; from
result files the fastest run of each strategy. All on one scale of time, which begins where the
target's prefill ends and the first token is there. Without `--start` and
`--end`: the target's first steps after its prefill, until the first of the panels is done with
them.

A forward is coloured to the height of its share that was rejected: of a draft, tokens that a
rollback removed; of the target, candidates that it did not accept. The number below a step of the
target is how many tokens it brought. See `timelines` for what result files cannot say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from pipespec.errors import DataError, NothingLeftError, UsageError
from pipespec.results.labels import Metadata, lookahead_text, short_names
from pipespec.results.streaming import find_files
from pipespec.trace.check import find_problems, read_trace
from pipespec.trace.events import WAIT
from viz.timelines import Slice, Timeline, is_trace, read_timelines, timeline_of
from viz.utils import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    Run,
    by_target,
    fastest,
    make_parser,
    open_output,
    pass_over,
    read,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Options = dict[str, Any]

# Okabe and Ito's colours.
COLORS: Final[Mapping[str, str]] = {
    "prefill": "#999999",
    "decode": "#0072b2",
    "draft": "#56b4e9",
    "prepare": "#009e73",
    "verify": "#0072b2",
    WAIT: "#f0e442",
}
LABELS: Final[Mapping[str, str]] = {"prepare": "prepare outcomes"}
REJECTED_COLOR: Final = "#d55e00"
STEPS: Final = {COLUMN_WIDTH: 16, PAGE_WIDTH: 40}
_HEIGHT: Final = 0.8
_WAIT_HEIGHT: Final = 0.25
_LANE_INCHES: Final = 0.3
_ROOM_FOR_NUMBER: Final = 0.018  # of the window's width


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser(
        "pipeline_timeline",
        "Draws what every model did when, from traces or result files, or folders of them.",
    )
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="index in the data set")
    clock = "seconds since the end of the target's prefill"
    parser.add_argument("--start", type=float, metavar="S", help=clock)
    parser.add_argument("--end", type=float, metavar="S", help=clock)
    parser.add_argument(
        "--page", action="store_true", help="at the width of a page, with more steps"
    )
    parser.add_argument(
        "--no-verdicts", action="store_true", help="without the arrows of verdicts (of traces)"
    )
    options = parser.parse_args(arguments)
    output = open_output(options)
    pictures = read_pictures(options.paths, options.sample)
    width = PAGE_WIDTH if options.page else COLUMN_WIDTH
    for name, timelines in pictures.items():
        window_s = find_window(timelines, options.start, options.end, STEPS[width])
        if options.no_verdicts:
            timelines = [replace(timeline, verdicts=()) for timeline in timelines]
        with style():
            figure = draw(timelines, window_s, width)
        suffix = "" if len(pictures) == 1 else f"-{name}"
        output.save(figure, f"pipeline-timeline{suffix}")
    return 0


def read_pictures(paths: Sequence[Path], sample: int) -> dict[str, list[Timeline]]:
    """The timelines of each picture by its name: one a trace, and one a target and data set of the
    result files. What cannot be used is passed over with a line on stderr.

    Raises:
        NothingLeftError: nothing could be used.
    """
    pictures: dict[str, list[Timeline]] = {}
    files = find_files(paths)
    traces = [path for path in files if is_trace(path)]
    for path in traces:
        try:
            pictures[path.stem] = _of_trace(path, sample)
        except DataError as error:
            pass_over(f"passed over: {path}: {error}")
    others = [path for path in files if path not in traces]
    if others:
        try:
            pictures |= _of_results(others, sample)
        except NothingLeftError:
            if not pictures:
                raise
    if not pictures:
        raise NothingLeftError("none of these files has what this picture shows")
    return pictures


def _of_trace(path: Path, sample: int) -> list[Timeline]:
    content = read_trace(path)
    if problems := find_problems(content["traceEvents"]):
        raise DataError(f"{problems[0]}; python -m pipespec.trace lists all problems")
    return [timeline.since_prefill() for timeline in read_timelines(content, sample)]


def _of_results(files: Sequence[Path], sample: int) -> dict[str, list[Timeline]]:
    """The fastest run of each strategy that has the sample, by target."""

    def keep(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return result["metrics"] if result["sample_index"] == sample else None

    runs: list[Run[Timeline]] = []
    for run in read(files, keep):
        found = [metrics for metrics in run.samples if metrics is not None]
        try:
            if not found:
                raise ValueError(f"has no sample {sample}; name another with --sample")
            timeline = timeline_of(_title(run.metadata), run.metadata, found[0]).since_prefill()
        except (KeyError, TypeError, ValueError, IndexError, DataError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            pass_over(f"passed over: {run.path} {what}")
        else:
            facts = (run.path, run.metadata, (timeline,), run.num_tokens, run.total_time_s)
            runs.append(Run(*facts))
    if not runs:
        raise NothingLeftError("none of these runs has what this picture shows")
    drawn = fastest(runs, lambda metadata: metadata["strategy"])
    return {
        title.rpartition(" ")[2]: [run.samples[0] for run in found]
        for title, found in by_target(drawn).items()
    }


def _title(metadata: Metadata) -> str:
    """What the lanes do not say."""
    if metadata["strategy"] == "greedy":
        return "greedy"
    return f"{metadata['strategy']}, lookahead {lookahead_text(metadata)}"


def find_window(
    timelines: Sequence[Timeline], start_s: float | None, end_s: float | None, num_steps: int
) -> tuple[float, float]:
    """What is drawn; seconds since the target's prefill.

    Raises:
        UsageError: nothing can lie between start and end.
    """
    begin_s = 0.0 if start_s is None else start_s
    length_s = min(timeline.end_of_steps(num_steps) for timeline in timelines)
    stop_s = begin_s + length_s if end_s is None else end_s
    if not begin_s < stop_s:
        raise UsageError(f"--start is {begin_s:g} and --end {stop_s:g}; it must come after it")
    return begin_s, stop_s


def draw(timelines: Sequence[Timeline], window_s: tuple[float, float], width: float) -> Figure:
    """A panel a timeline, on one scale; the last lane of each is its target."""
    from matplotlib.figure import Figure

    names = short_names(
        {"strategy": "", "model_configs": [{"path": lane.name} for lane in timeline.lanes]}
        for timeline in timelines
    )
    num_lanes = [len(timeline.lanes) + 0.2 for timeline in timelines]
    height = 0.75 + 0.3 * len(timelines) + _LANE_INCHES * sum(num_lanes)
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(
        len(timelines), 1, sharex=True, squeeze=False, height_ratios=num_lanes
    )[:, 0]
    for axes, timeline in zip(panels, timelines):
        _draw_panel(axes, timeline, window_s)
        labels = [names[lane.name] for lane in timeline.lanes]
        axes.set_yticks(range(len(timeline.lanes)), labels)
    panels[-1].set_xlabel("ms since the target's prefill")
    panels[-1].set_xlim(1000 * window_s[0], 1000 * window_s[1])
    drawn = [found for t in timelines for lane in t.lanes for found in lane.within(window_s)]
    _draw_legend(figure, drawn, num_columns=3 if width == COLUMN_WIDTH else 6)
    return figure


def _draw_panel(axes: Axes, timeline: Timeline, window_s: tuple[float, float]) -> None:
    room_s = _ROOM_FOR_NUMBER * (window_s[1] - window_s[0])
    for row, lane in enumerate(timeline.lanes):
        for found in lane.within(window_s):
            left, length = 1000 * found.start_s, 1000 * (found.end_s - found.start_s)
            height = _WAIT_HEIGHT if found.kind == WAIT else _HEIGHT
            edge: Options = {"align": "edge", "edgecolor": "white", "linewidth": 0.2}
            bottom = row + _HEIGHT / 2
            axes.bar(left, -height, length, bottom, color=COLORS[found.kind], **edge)
            if found.rejected:
                lost = -height * min(found.rejected, 1.0)
                hatch: Options = {"color": REJECTED_COLOR, "hatch": "//////"}
                axes.bar(left, lost, length, bottom, **hatch, **edge)
            middle_s = (found.start_s + found.end_s) / 2
            is_seen = window_s[0] < middle_s < window_s[1] and found.end_s - found.start_s > room_s
            if row == len(timeline.lanes) - 1 and found.kind == "verify" and is_seen:
                text: Options = {"ha": "center", "va": "top", "fontsize": 6}
                axes.text(1000 * middle_s, row + 0.41, str(found.num_emitted), **text)
    for arrow in timeline.verdicts:
        if window_s[0] <= arrow.sent_s and arrow.received_s <= window_s[1]:
            start = 1000 * arrow.sent_s, arrow.from_lane - _HEIGHT / 2
            end = 1000 * arrow.received_s, arrow.to_lane + _HEIGHT / 2
            look: Options = {
                "arrowstyle": "->",
                "lw": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
                "mutation_scale": 4,
            }
            axes.annotate("", end, start, arrowprops=look)
    axes.set_ylim(len(timeline.lanes) - 0.3, -0.5)
    axes.set_title(timeline.title + (f"\n({timeline.note})" if timeline.note else ""), loc="left")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _draw_legend(figure: Figure, drawn: Sequence[Slice], num_columns: int) -> None:
    from matplotlib.patches import Patch

    found = {item.kind for item in drawn}
    handles = []
    for color in dict.fromkeys(COLORS[kind] for kind in COLORS if kind in found):
        names = [LABELS.get(k, k) for k in COLORS if k in found and COLORS[k] == color]
        handles.append(Patch(facecolor=color, label=" / ".join(names)))
    if any(item.rejected for item in drawn):
        rejected = Patch(
            facecolor=REJECTED_COLOR, hatch="//////", edgecolor="white", label="rejected"
        )
        handles.append(rejected)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=num_columns,
        columnspacing=1.2,
        handlelength=1.6,
    )


if __name__ == "__main__":
    sys.exit(main())
