"""What the README shows works: its code runs, its commands parse, its files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipespec import (
    benchmark,
    compare,
    doctor,
    plan,
    print_benchmark_stats,
    report,
    run_example,
)
from pipespec.config import load_models_config
from pipespec.trace.__main__ import make_parser as make_trace_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SEEING = (ROOT / "docs" / "seeing.md").read_text(encoding="utf-8")
PARSERS = {
    "pipespec.benchmark": benchmark.make_parser,
    "pipespec.compare": compare.make_parser,
    "pipespec.doctor": doctor.make_parser,
    "pipespec.plan": plan.make_parser,
    "pipespec.print_benchmark_stats": print_benchmark_stats.make_parser,
    "pipespec.report": report.make_parser,
    "pipespec.run_example": run_example.make_parser,
    "pipespec.trace": make_trace_parser,
}


def block(language: str) -> str:
    """The README's one fenced block in `language`."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return found


def commands() -> list[str]:
    """Every command of ours in indented blocks."""
    found = re.findall(r"^    .*?(python -m pipespec\..*)$", README + SEEING, re.MULTILINE)
    found = [command for command in found if "[--" not in command]
    assert len(found) >= 5
    return found


def test_the_python_quickstart_writes_a_text() -> None:
    assert len(block("python").split("\n\n")[1].splitlines()) <= 5
    run = subprocess.run(
        [sys.executable, "-c", block("python")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 20


def test_the_models_config_is_one(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_text(block("json"))
    assert [model.quantize for model in load_models_config(path)] == [None, None, "4bit"]


@pytest.mark.parametrize("command", commands())
def test_a_command_is_one_that_can_be_given(command: str) -> None:
    _, _, module, *flags = shlex.split(command)
    options = PARSERS[module]().parse_args(flags)
    assert (ROOT / getattr(options, "models_config_path", "README.md")).is_file()


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\]\(([^):#]+)\)|`((?:configs|launch|pipespec|tests|viz)/[^` ]*)", README)
    paths = {first or second for first, second in named}
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
