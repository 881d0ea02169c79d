"""Tests marked `alone` have no other test beside them, however many workers share a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", range(6))
{mark}
def test_it(number):
    start_s = time.monotonic()
    time.sleep(0.05)
    with Path({log!r}).open("a") as log:
        print({name!r}, start_s, time.monotonic(), file=log)
"""


def test_nothing_runs_beside_a_test_that_is_marked(tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path)
    log = tmp_path / "log"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone\n    gpu\n")
    for name, mark in (("beside", ""), ("beside_too", ""), ("alone", "@pytest.mark.alone")):
        module = TESTS.format(mark=mark, log=str(log), name=name)
        (tmp_path / f"test_{name}.py").write_text(module)
    command = [sys.executable, "-m", "pytest", "-n", "3", "-p", "xdist", "-p", "no:cacheprovider"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    lines = [line.split() for line in log.read_text().splitlines()]
    spans = sorted((float(start_s), float(end_s), name) for name, start_s, end_s in lines)
    overlaps = [
        {one, other} for (_, end_s, one), (start_s, _, other) in pairwise(spans) if start_s < end_s
    ]
    assert len(spans) == 18
    assert {"beside", "beside_too"} in overlaps, "else this test would show nothing"
    assert not [names for names in overlaps if "alone" in names]
