"""Output that cannot be written: a reader who has left, a full disk, no stream at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
PLAN = ("pipespec.plan", "--models-config-path", "configs/models/emulated-h100-70b.json")
SMALL = ("--num-samples", "1", "--max-new-tokens", "4")


def run(*arguments: str, stdout: int, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """A command's exit code and what it wrote to stderr, if that is a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr or ""


@pytest.fixture
def closed_pipe() -> int:
    """The end to write to, of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_reader_who_left_ends_a_command_in_silence(closed_pipe: int) -> None:
    assert run(*PLAN, *SMALL, stdout=closed_pipe) == (141, "")
    os.close(closed_pipe)


def test_news_that_nobody_reads_end_a_command_too(closed_pipe: int, tmp_path: Path) -> None:
    flags = ("--simulated", *PLAN[1:], *SMALL, "--output", str(tmp_path / "race.json"))
    code, _ = run("pipespec.compare", *flags, stdout=subprocess.DEVNULL, stderr=closed_pipe)
    assert code == 141
    os.close(closed_pipe)


def test_an_error_that_nobody_reads_keeps_its_exit_code(closed_pipe: int) -> None:
    flags = ("pipespec.plan", "--num-samples", "many")
    assert run(*flags, stdout=subprocess.DEVNULL, stderr=closed_pipe)[0] == 2
    os.close(closed_pipe)


@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    "flags", [(*PLAN, *SMALL), ("viz.training_curves", "pipespec/demo/training.json", "--output")]
)
def test_a_full_disk_behind_the_output_is_said_in_one_line(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    if flags[-1] == "--output":
        flags = (*flags, str(tmp_path / "curves.png"))
    with FULL.open("w") as full:
        code, errors = run(*flags, stdout=full.fileno())
    assert (code, errors) == (1, "error: No space left on device, while writing the output\n")
