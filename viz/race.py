"""Draws a race: tokens per second of each contestant with its spread, both tables side by side.

    python -m viz.race results/compare/RACE.json --output race.png

Bars are medians over the rounds, whiskers reach from the slowest to the fastest round, and the
numbers at a bar are the ratio to greedy within a round: median, lowest, highest. No torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.arguments import Parser
from pipespec.commands.entry import run_command
from pipespec.comparison.measures import Row, table_rows
from pipespec.comparison.record import Record, load
from pipespec.comparison.tables import HEADLINES, extent, label, model_names, what_it_is
from pipespec.errors import DataError
from pipespec.results.labels import COLORS
from viz.utils import check_output, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PEER_COLOR: Final = "#b2abd2"
_COMMAND_COLOR: Final = "#4d9221"
_ROOM_FOR_LABELS: Final = 1.42


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m viz.race",
        description="Draws the tables of a race side by side.",
    )
    parser.add_argument("path", type=Path, metavar="FILE", help="of python -m pipespec.compare")
    parser.add_argument(
        "--output", type=Path, default=Path("race.png"), help="the picture: .png, .pdf or .svg"
    )
    options = parser.parse_args(arguments)
    check_output(options.output)
    record = load(options.path)
    tables = read_tables(record, options.path)
    save(draw(record, tables), options.output)
    print(f"{sum(map(len, tables.values()))} bars: {options.output}")
    return 0


def read_tables(record: Record, path: Path) -> dict[str, list[Row]]:
    """The rows of each table that has any.

    Raises:
        DataError: nobody had a turn.
    """
    tables = {table: table_rows(record, table) for table in record.metadata["tables"]}
    found = {table: rows for table, rows in tables.items() if rows}
    if not found:
        raise DataError(f"{path} holds no turn of anyone; let the race run for longer")
    return found


def draw(record: Record, tables: Mapping[str, Sequence[Row]]) -> Figure:
    """A panel a table, on one scale; contestants from the top, as in the table."""
    from matplotlib.figure import Figure

    metadata = record.metadata
    height = 1.5 + 0.32 * max(map(len, tables.values()))
    figure = Figure(figsize=(1.5 + 6.0 * len(tables), height), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    fastest = max(row.tokens_per_s.high for rows in tables.values() for row in rows)
    for axes, (table, rows) in zip(panels, tables.items()):
        _draw_table(axes, rows)
        axes.set_title(f"{HEADLINES[table]}\n{metadata['tables'][table]}", fontsize=10)
        axes.set_xlim(0, _ROOM_FOR_LABELS * fastest)
    title = f"{what_it_is(metadata)}{' > '.join(model_names(metadata))}, {extent(record)}"
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_table(axes: Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    speeds = [row.tokens_per_s for row in rows]
    whiskers = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
    axes.barh(places, [s.median for s in speeds], color=[_color(row) for row in rows], alpha=0.75)
    axes.errorbar(
        [s.median for s in speeds],
        places,
        xerr=whiskers,
        fmt="none",
        color="black",
        capsize=2,
        lw=1,
    )
    for place, row in zip(places, rows):
        if row.ratio is not None:
            text = f" {row.ratio.median:.2f}x ({row.ratio.low:.2f}-{row.ratio.high:.2f})"
            axes.text(row.tokens_per_s.high, place, text, va="center", fontsize=9)
    axes.set_yticks(places, [label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("tokens/s (x: greedy of the same panel)")
    axes.spines[["top", "right"]].set_visible(False)


def _color(row: Row) -> str:
    if row.entrant.kind == "own":
        return COLORS[row.entrant.settings["strategy"]]
    return _PEER_COLOR if row.entrant.kind == "transformers" else _COMMAND_COLOR


if __name__ == "__main__":
    sys.exit(main())
