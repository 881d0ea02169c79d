"""`python -m pipespec.print_benchmark_stats`: tables of result files, ours and the original's.

Four modes: all runs side by side; one file in detail; greedy speeds; how unevenly tokens are
accepted. Files are read sample by sample and only sums are kept, so their size does not matter.
"""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from pipespec.commands.arguments import Parser
from pipespec.commands.display import PLAIN_WIDTH, make_console
from pipespec.commands.entry import run_command
from pipespec.commands.reading import read_results
from pipespec.errors import UsageError
from pipespec.metrics import sample_totals
from pipespec.results import RunExtract, ensure_writable_file
from pipespec.statistics.accepted import AcceptedSample, accepted_sample, accepted_tables
from pipespec.statistics.baselines import baseline_tables
from pipespec.statistics.comparison import comparison_tables
from pipespec.statistics.formats import to_csv, to_json, to_latex, to_markdown
from pipespec.statistics.groups import group_runs, only_dataset
from pipespec.statistics.single import single_tables
from pipespec.statistics.tables import Table
from pipespec.statistics.text import print_tables

MODES: Final = ("stats", "single", "baseline-timing", "accepted-tokens")
FORMATS: Final = {
    "csv": to_csv,
    "json": to_json,
    "latex": to_latex,
    "markdown": to_markdown,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _print_stats(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.print_benchmark_stats",
        description="Prints tables of result files, PipeSpec's and the original's. Files that "
        "cannot be used are named on stderr and passed over.",
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="result files, or folders of them"
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="stats: all runs, by data set and target; single: one file, with its samples and "
        "GPUs; baseline-timing: tokens/s of each model by itself; accepted-tokens: tokens per "
        "verification, in fifths",
    )
    parser.add_argument(
        "--format",
        choices=("text", *sorted(FORMATS)),
        default="text",
        help="csv and json have all columns, with their units in the names",
    )
    parser.add_argument("--dataset", metavar="NAME", help="only the runs on this data set")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every lookahead, not only the fastest of each hierarchy and the policy's choice",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write there, not to standard output"
    )
    return parser


def _print_stats(options: Namespace) -> int:
    if options.output is not None:
        ensure_writable_file(options.output, "--output")
    tables = _tables(options)
    if options.output is None:
        _write_to_stdout(tables, options.format)
    else:
        _write_to_file(tables, options.format, options.output)
        sys.stdout.write(f"{options.output}\n")
    return 0


def _tables(options: Namespace) -> list[Table]:
    if options.mode == "accepted-tokens":
        return _accepted_tables(options)
    runs = only_dataset(read_results(options.paths, sample_totals), options.dataset)
    if options.mode == "single":
        if len(runs) != 1:
            raise UsageError(f"--mode single is for one file; {len(runs)} were found")
        return single_tables(runs[0])
    groups = group_runs(runs)
    if options.mode == "baseline-timing":
        return baseline_tables(groups)
    return comparison_tables(groups, show_all=options.all)


def _accepted_tables(options: Namespace) -> list[Table]:
    runs: list[RunExtract[AcceptedSample]] = read_results(options.paths, accepted_sample)
    totals = [
        RunExtract(run.path, run.metadata, tuple(sample.totals for sample in run.samples))
        for run in runs
    ]
    groups = group_runs(only_dataset(totals, options.dataset))
    return accepted_tables(groups, runs, show_all=options.all)


def _write_to_stdout(tables: Sequence[Table], form: str) -> None:
    if form == "text":
        print_tables(tables, make_console())
    else:
        sys.stdout.write(FORMATS[form](tables))


def _write_to_file(tables: Sequence[Table], form: str, path: Path) -> None:
    if form == "text":
        written = io.StringIO()
        print_tables(tables, Console(file=written, width=PLAIN_WIDTH, highlight=False))
        text = written.getvalue()
    else:
        text = FORMATS[form](tables)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output: cannot write {path} ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(main())
