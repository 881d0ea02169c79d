"""Writes pictures; what every script here shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipespec.errors import UsageError
from pipespec.results import ensure_writable_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS: Final = (".png", ".pdf", ".svg")
DPI: Final = 150


def check_output(output: Path) -> None:
    """Refuse a file that no picture can be written to, before any work is done.

    Raises:
        UsageError: another ending than those of `FORMATS`, or it cannot be written.
    """
    if output.suffix not in FORMATS:
        raise UsageError(f"--output is {output}; it must end in {', '.join(FORMATS)}")
    ensure_writable_file(output, "--output")


def save(figure: Figure, output: Path) -> None:
    """Write a figure to the file that `--output` names.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        figure.savefig(output, dpi=DPI)
    except OSError as error:
        raise UsageError(f"--output: cannot write {output} ({error.strerror})") from error
