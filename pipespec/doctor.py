"""`python -m pipespec.doctor`: what to know about a machine before believing a number from it.

Checks software, cores, sockets, GPUs and models, measures messages and memory, and runs and times
every way to compute a step that exists here. Exit code 1 if something is broken.
"""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from pipespec.checkup.devices import check_devices
from pipespec.checkup.findings import Mark, Section, count
from pipespec.checkup.host import check_host
from pipespec.checkup.links import check_links
from pipespec.checkup.memory import check_memory_speed
from pipespec.checkup.models import check_models
from pipespec.checkup.report import show_not_run, show_section, show_steps, verdict
from pipespec.checkup.runner_paths import result_findings, table_rows
from pipespec.checkup.shapes import SHAPES
from pipespec.checkup.software import check_software
from pipespec.checkup.steps import Outcome, Plan, run_paths, run_shapes, shipped_subjects
from pipespec.commands.arguments import DEFAULT_MODELS_CONFIG, Parser
from pipespec.commands.display import make_console
from pipespec.commands.entry import run_command
from pipespec.config import RUNNERS, find_models_config, load_models_config
from pipespec.errors import DataError, UsageError
from pipespec.machine import this_machine
from pipespec.placement import Machine
from pipespec.results import describe_environment, ensure_writable_file

DEFAULT_SECONDS: Final = 15.0
SCHEMA_VERSION: Final = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _doctor(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.doctor",
        description="Looks at this machine, runs and times every way to compute a step, and says "
        "what is wrong. Takes about a minute.",
    )
    parser.add_argument(
        "--models-config-path",
        metavar="FILE",
        default=DEFAULT_MODELS_CONFIG,
        help="whose placement is checked",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        default=DEFAULT_SECONDS,
        help="for timing steps, all paths and models together; loading comes on top. 0 runs none",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=tuple(SHAPES),
        metavar="NAME",
        help=f"also time random weights of these sizes: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="on the CPU too, time transformers' static cache with torch.compile",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    return parser


def _doctor(options: Namespace) -> int:
    if not (math.isfinite(options.seconds) and options.seconds >= 0):
        raise UsageError(f"--seconds is {options.seconds:g}; it must be 0 or more")
    config = find_models_config(options.models_config_path)
    load_models_config(config)  # one that is wrong is said before anything is looked at
    if options.json is not None:
        ensure_writable_file(options.json, "--json")
    console = make_console()
    ticker = Ticker(make_console(stderr=True))
    examination = Examination(console, ticker, options.json)
    try:
        examination.run(config, options)
    finally:
        ticker.clear()
    console.print(verdict(examination.sections))
    return 1 if count(examination.sections, Mark.PROBLEM) else 0


class Examination:
    """The checks in order; each is shown, and written to the file, when it is done."""

    def __init__(self, console: Console, ticker: Ticker, output: Path | None) -> None:
        self.sections: list[Section] = []
        self._console = console
        self._ticker = ticker
        self._output = output
        self._outcome = Outcome()
        self._environment = describe_environment()

    def run(self, config: Path, options: Namespace) -> None:
        say = self._ticker.say
        environ = dict(os.environ)
        machine = this_machine(environ)
        self._add(check_software(len(machine.gpu_ids)))
        say("looking at cores and memory")
        self._add(check_host(machine))
        self._add(_check_gpus(machine, environ))
        self._add(check_models(config, machine, environ))
        say("timing messages between two processes")
        self._add(check_links(machine.cores, environ))
        say("measuring how fast memory is read")
        section, cuda = check_memory_speed(machine, environ)
        self._add(section)
        plan = Plan(RUNNERS, options.seconds, cuda.why_not, options.compile, machine, environ)
        self._run_steps(plan, options.shapes or ())

    def _run_steps(self, plan: Plan, shapes: Sequence[str]) -> None:
        outcome, say = self._outcome, self._ticker.say
        if plan.seconds > 0:
            run_paths(plan, shipped_subjects(), outcome, say)
            run_shapes(plan, shapes, outcome, say)
        else:
            outcome.not_run["every runner"] = "--seconds 0"
        self._ticker.clear()
        for kind, where in (("cpu", "one core"), ("cuda", "the GPU")):
            rows = table_rows([result for result in outcome.results if result.path.kind == kind])
            if rows:
                show_steps(self._console, where, rows)
        self._add(Section("Steps", result_findings(outcome.results)))
        show_not_run(self._console, outcome.not_run)

    def _add(self, section: Section) -> None:
        self.sections.append(section)
        self._ticker.clear()
        if section.findings:
            show_section(self._console, section)
        self._save()

    def _save(self) -> None:
        """Writes what there is so far, never half of it."""
        if self._output is None:
            return
        values: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "environment": self._environment,
            "sections": [section.to_json() for section in self.sections],
            "steps": [result.to_json() for result in self._outcome.results],
            "not_run": self._outcome.not_run,
        }
        partial = self._output.with_name(f"{self._output.name}.partial")
        try:
            partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            partial.replace(self._output)
        except OSError as error:
            raise DataError(f"--json {self._output}: {error.strerror or error}") from error


def _check_gpus(machine: Machine, environ: Mapping[str, str]) -> Section:
    import pynvml

    return check_devices(pynvml, environ.get("CUDA_VISIBLE_DEVICES"), len(machine.gpu_ids))


class Ticker:
    """What is under way, on stderr: a line that is replaced on a terminal, lines elsewhere. Redrawn
    only when there is news: a thread that draws would disturb what is timed."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False, soft_wrap=True)
            return
        self.clear()
        self._console.print(f"{text} ..."[: self._console.width - 1], markup=False, end="")

    def clear(self) -> None:
        """Before something else is written, and at the end."""
        if self._console.is_terminal:
            erase = (ControlType.ERASE_IN_LINE, 2)
            self._console.control(Control(ControlType.CARRIAGE_RETURN, erase))


if __name__ == "__main__":
    sys.exit(main())
