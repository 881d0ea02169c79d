"""A child process that reads JSON and writes JSON lines: how checks run what must not run here.

It ends with the call, whatever happens: by itself, at its deadline, or with an interrupt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pipespec.interrupts import hold_interrupts
from pipespec.placement import StagePlacement
from pipespec.stage_process import stage_environment

_GRACE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a child wrote, line by line; error: why it ended early, or empty."""

    lines: tuple[dict[str, Any], ...]
    error: str

    def first(self, key: str) -> Any:
        """The value of `key` in the first line that has it; None if none has."""
        return next((line[key] for line in self.lines if key in line), None)


def ask(
    module: str,
    question: Mapping[str, Any],
    *,
    placement: StagePlacement,
    inherited: Mapping[str, str],
    timeout_s: float,
) -> Reply:
    """Runs `python -m module` with `question` on its standard input.

    placement: as for a stage; the child is told the cores in the question and pins itself.
    inherited: the environment to start from.
    """
    with hold_interrupts():
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, **stage_environment(placement, inherited)},
        )
    is_late = False
    try:
        output, errors = process.communicate(
            json.dumps({**question, "cores": list(placement.cores)}), timeout_s
        )
    except subprocess.TimeoutExpired:
        is_late = True
        process.kill()
        output, errors = process.communicate()
    finally:
        _end(process)
    return Reply(_parse(output), _why(process.returncode, errors, timeout_s if is_late else None))


def answer(values: Mapping[str, Any]) -> None:
    """In a child: one line of the reply. What libraries print must not get between the lines."""
    os.write(1, (json.dumps(values) + "\n").encode())


def _end(process: subprocess.Popen[str]) -> None:
    """Interrupts what still runs, so that it can end what it started itself, then kills it."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _parse(output: str) -> tuple[dict[str, Any], ...]:
    lines = []
    for text in output.splitlines():
        try:
            value = json.loads(text)
        except ValueError:
            continue  # a library's
        if isinstance(value, dict):
            lines.append(value)
    return tuple(lines)


def _why(code: int, errors: str, late_s: float | None) -> str:
    if late_s is not None:
        return f"no answer within {late_s:.0f} s"
    if code == 0:
        return ""
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    if last:
        return " ".join(last.split())[:200]
    if code == -signal.SIGKILL:
        return "killed; perhaps the system ran out of memory"
    return f"exit status {code}"
