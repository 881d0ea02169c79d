"""What tests of real processes share: waiting, and the proof that nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import pipespec

DEADLINE_S = 30.0


@contextmanager
def nothing_left_in(directory: Path) -> Iterator[Path]:
    """Makes `directory` the one for temporary files, of child processes too. At the end no run
    directory is left in it, and no process that was started within is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        patch.setattr("tempfile.tempdir", str(directory))
        yield directory
        wait_until(lambda: not list(directory.glob("ps-*")), "files are left")
        assert not psutil.Process().children(), "processes are left"


def wait_until(condition: Callable[[], bool], complaint: str = "took too long") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, from the root of the repository."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_draws_without_torch(module: str, source: Path, says: str) -> None:
    """The script draws what is at `source` and prints `says` and the path of the picture."""
    picture = source.with_name("picture.png")
    code = (
        f"import sys; from {module} import main\n"
        "assert main([sys.argv[1], '--output', sys.argv[2]]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    run = run_python(code, str(source), str(picture))
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{says}: {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


@contextmanager
def python(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """An interpreter in a process group of its own that finds this code, installed or not."""
    folders = (Path(pipespec.__file__).parents[1], Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)
