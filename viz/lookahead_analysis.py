"""Draws milliseconds a token over the lookahead: how far ahead it pays to draft.

    python viz/lookahead_analysis.py RESULTS_FOLDER

`sweep` with the metric and the flag that matter most; greedy is a level line, `auto` a larger mark.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.entry import run_command
from pipespec.metrics import sample_totals
from viz.sweep import draw, read_panels
from viz.utils import make_parser, open_output, read, style


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser("lookahead_analysis", "Draws milliseconds a token over the lookahead.")
    options = parser.parse_args(arguments)
    output = open_output(options)
    panels = read_panels(read(options.paths, sample_totals), "ms_per_token", "lookahead")
    with style():
        figure = draw(panels, "ms_per_token", "lookahead")
    output.save(figure, "lookahead-analysis")
    return 0


if __name__ == "__main__":
    sys.exit(main())
