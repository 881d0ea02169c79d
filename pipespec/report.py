"""`python -m pipespec.report`: one HTML page of a folder of result files, to open in any browser.

The page has everything in it and fetches nothing: tables, plots, machine and configuration, and the
samples one by one, with the tokens that the target accepted, corrected and added in colours.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pipespec.commands.arguments import Parser
from pipespec.commands.entry import run_command
from pipespec.commands.reading import read_results
from pipespec.errors import UsageError
from pipespec.reporting.data import Keeper, group_samples
from pipespec.reporting.page import make_page
from pipespec.results import ensure_writable_file

DEFAULT_MAX_SAMPLES: Final = 20
SUFFIXES: Final = (".html", ".htm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _report(arguments))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.report",
        description="Writes one HTML page of a folder of result files: tables, plots, "
        "configuration, and every sample with accepted, corrected and bonus tokens coloured.",
    )
    parser.add_argument(
        "results", metavar="RESULTS_FOLDER", type=Path, help="searched for result files"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("report.html"), help="the page"
    )
    parser.add_argument(
        "--max-samples",
        metavar="N",
        type=_count,
        default=DEFAULT_MAX_SAMPLES,
        help="of each run that can be looked at one by one; numbers are always of all",
    )
    return parser


def _report(arguments: Sequence[str] | None) -> int:
    options = make_parser().parse_args(arguments)
    output: Path = options.output
    if output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--output is {output}; it must end in {' or '.join(SUFFIXES)}")
    ensure_writable_file(output, "--output")
    keeper = Keeper(options.max_samples)
    skipped: list[str] = []
    runs = read_results([options.results], keeper, on_file=keeper.on_file, on_skip=skipped.append)
    page = make_page(group_samples(runs), skipped)
    _write(output, page.html)
    num_runs = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    print(f"{num_runs}, {page.num_samples} samples to look at: {output}")
    return 0


def _write(output: Path, text: str) -> None:
    """In one step, so that a page that is there stays whole until the new one is."""
    temporary = output.with_name(output.name + ".tmp")
    try:
        # Half of a surrogate pair, which JSON can spell, is no text; browsers show U+FFFD for it.
        temporary.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))
        os.replace(temporary, output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise UsageError(f"--output: cannot write {output} ({reason})") from error


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ArgumentTypeError(f"{text} is not a count, 0 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
