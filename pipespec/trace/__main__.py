"""`python -m pipespec.trace FILE...`: checks traces, and says where the time went.

Exit code 1 if one has a problem; every problem is a line on standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pipespec.commands.arguments import Parser
from pipespec.commands.display import make_console
from pipespec.commands.entry import run_command
from pipespec.trace.check import find_problems, read_trace
from pipespec.trace.summary import summarise, table

MAX_SHOWN: Final = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(make_parser().parse_args(arguments).paths))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.trace",
        description="Checks traces that --trace wrote, and says where the time went.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    return parser


def _main(paths: Sequence[Path]) -> int:
    return max(_check(path) for path in paths)


def _check(path: Path) -> int:
    console = make_console()

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    content = read_trace(path)
    problems = find_problems(content["traceEvents"])
    for problem in problems[:MAX_SHOWN]:
        line(f"{path}: {problem}")
    if problems:
        if len(problems) > MAX_SHOWN:
            line(f"{path}: {len(problems) - MAX_SHOWN} more problems")
        return 1
    line(f"{path}: ok, {len(content['traceEvents']):,} events")
    for summary in summarise(content):
        line("")
        plural = "" if summary.num_samples == 1 else "s"
        line(f"{summary.strategy}, {summary.num_samples} sample{plural}")
        for text in table(summary):
            line(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
