"""`python -m pipespec.demo.train --out DIR`: trains the demo family on the Python code at hand.

The same command, given again after an interruption, continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from pipespec.commands.arguments import Parser
from pipespec.commands.entry import CommandConsole, library_errors, run_command
from pipespec.demo.corpus import package_files, train_files
from pipespec.demo.progress import ProgressDisplay
from pipespec.demo.settings import MAX_THREADS, FamilyPlan
from pipespec.errors import StageError, UsageError

DEFAULT_MINUTES: Final = 240.0  # twice what two slow cores take


def main(arguments: Sequence[str] | None = None, plan: FamilyPlan | None = None) -> int:
    """Run the command; returns the exit code. `plan` stands in for the shipped one in tests."""
    return run_command(lambda: _run(arguments, FamilyPlan() if plan is None else plan))


def _run(arguments: Sequence[str] | None, plan: FamilyPlan) -> int:
    options = _parser().parse_args(arguments)
    _check(options)
    try:
        with library_errors("training"):
            _train(options, plan)
    except (KeyboardInterrupt, SystemExit, StageError) as error:
        error.add_note("the same command continues from the last checkpoint")
        raise
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m pipespec.demo.train",
        description="Trains the demo models on the running Python's standard library and on "
        "installed packages.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the models' folders")
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="folder for checkpoints and token caches; if not given, OUT/checkpoints",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="guard on the time spent; the budget itself is counted in tokens",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=FamilyPlan().seed, help="of weights and order")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the models; faster, needs a C++ compiler",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    if not 0 < options.minutes < float("inf"):
        raise UsageError(f"--minutes is {options.minutes:g}; give a number above 0")
    if not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(f"--threads is {options.threads}; give 1 to {MAX_THREADS}")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"--seed is {options.seed}; give 0 to 2**63 - 1")
    for flag, folder in (("--out", options.out), ("--work-dir", options.work_dir)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(f"{flag} {folder} is a file; name a folder")


def _train(options: argparse.Namespace, plan: FamilyPlan) -> None:
    console = CommandConsole(stderr=True, soft_wrap=True, highlight=False)
    out: Path = options.out
    work: Path = options.work_dir or out / "checkpoints"
    for flag, folder in (("--out", out), ("--work-dir", work)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{flag}: cannot write to {folder} ({error.strerror})") from error
    from pipespec.demo.family import save_records, train_family  # takes seconds

    plan = replace(plan, seed=options.seed, compile=plan.compile and options.compile)
    with ProgressDisplay(console) as display:
        records = train_family(
            plan,
            train_files(),
            package_files(),
            out,
            work,
            options.minutes * 60.0,
            options.threads,
            display.show,
        )
    save_records(records, out / "training.json")
    for record in records:
        note = "; cut short by --minutes" if record.cut_short else ""
        console.print(
            f"{out / record.name}: {record.num_steps:,} steps, {record.num_tokens:,} tokens, "
            f"loss {record.loss:.3f}, {record.elapsed_s:.0f} s{note}",
            markup=False,
        )


if __name__ == "__main__":
    sys.exit(main())
