"""`python -m pipespec.demo.evaluate DIR`: what a demo family is worth on text it has not seen.

The command alone; what it does is in `evaluation`, which takes seconds to import.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipespec.commands.arguments import Parser
from pipespec.commands.entry import CommandConsole, library_errors, run_command
from pipespec.demo.figures import EvaluationSettings
from pipespec.demo.progress import ProgressDisplay
from pipespec.demo.settings import MAX_THREADS
from pipespec.errors import UsageError


def _parser() -> Parser:
    defaults = EvaluationSettings()
    parser = Parser(
        prog="python -m pipespec.demo.evaluate",
        description="Measures a demo family on the standard library's held-out modules and on "
        "held-out arithmetic questions.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the model folders")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")

    def number(flag: str, default: int, says: str) -> None:
        parser.add_argument(flag, type=int, default=default, help=says)

    number("--prompts", defaults.num_prompts, "texts that each model writes")
    number("--tokens", defaults.num_tokens, "their length")
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=list(defaults.temperatures),
        help="of the texts beside the greedy ones",
    )
    number("--windows", defaults.num_windows, "pieces of held-out text")
    number("--questions", defaults.num_questions, "held-out arithmetic questions; 0 asks none")
    number("--answers", defaults.num_answers, "sampled answers to each")
    number("--samples", defaults.num_samples, "texts of the largest model to print")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch takes)")
    return parser


def _settings(options: argparse.Namespace) -> EvaluationSettings:
    for flag in ("prompts", "tokens", "windows", "questions", "answers", "samples"):
        least = 0 if flag in ("questions", "samples") else 1
        if getattr(options, flag) < least:
            raise UsageError(f"--{flag} is {getattr(options, flag)}; give at least {least}")
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise UsageError(f"--threads is {options.threads}; give 1 to {MAX_THREADS}")
    if options.samples > options.prompts:
        raise UsageError(
            f"--samples is {options.samples}, more than the {options.prompts} texts of --prompts"
        )
    for temperature in options.temperatures:
        if not 0.0 < temperature < float("inf"):
            raise UsageError(f"--temperatures has {temperature:g}; give numbers above 0")
    return EvaluationSettings(
        num_prompts=options.prompts,
        num_tokens=options.tokens,
        temperatures=tuple(options.temperatures),
        num_windows=options.windows,
        num_questions=options.questions,
        num_answers=options.answers,
        num_samples=options.samples,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    settings = _settings(options)
    errors = CommandConsole(stderr=True, soft_wrap=True, highlight=False)
    with library_errors("evaluation"), ProgressDisplay(errors) as display:
        from pipespec.demo.evaluate_tables import print_evaluation
        from pipespec.demo.evaluation import evaluate

        evaluation = evaluate(options.folder, settings, options.threads, display.show)
    if options.json:
        sys.stdout.write(json.dumps(asdict(evaluation), indent=2) + "\n")
    else:
        print_evaluation(evaluation, CommandConsole())
    return 0


if __name__ == "__main__":
    sys.exit(main())
