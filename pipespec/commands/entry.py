"""From an error to one line on stderr and an exit code, for every command.

Notes on an exception (`add_note`) say what was kept; they follow its message on the same line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console

from pipespec.errors import PipeSpecError, StageError
from pipespec.interrupts import install_signal_handlers

EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141
_TAIL_LINES: Final = 20


def run_command(body: Callable[[], int]) -> int:
    """Runs a command to its exit code; SIGTERM and SIGHUP unwind it like an exception.

    A failed stage's last log lines are printed below the error's line.
    """
    try:
        with install_signal_handlers():
            return body()
    except PipeSpecError as error:
        _report(f"error: {error}", error)
        if isinstance(error, StageError):
            for line in error.log_tail:
                _report(f"  | {line}")
        return error.exit_code
    except KeyboardInterrupt as error:
        _report("interrupted", error)
        return EXIT_INTERRUPTED
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            _report("stopped by a signal", error)
        raise
    except BrokenPipeError:
        # Whoever read our output has left; nothing must be written at interpreter exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What a library raises in this process (a device out of memory, say) is reported as a stage
    reports it from its own: one line that says `what` failed, and the last lines of the traceback.

    Raises:
        StageError: instead of what was raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        lines = "".join(traceback.format_exception(error)).splitlines()
        reason = " ".join(str(error).split())[:200] or "no message"
        raise StageError(
            f"{what} failed: {type(error).__name__}: {reason}", tuple(lines[-_TAIL_LINES:])
        ) from error


def configure_logging(verbose: bool) -> None:
    """Warnings to stderr; with `verbose`, what PipeSpec does as well."""
    form = (
        "%(asctime)s %(name)s %(levelname)s %(message)s" if verbose else "%(levelname)s %(message)s"
    )
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr)
    if verbose:
        logging.getLogger("pipespec").setLevel(logging.DEBUG)


def _report(message: str, error: BaseException | None = None) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    notes = getattr(error, "__notes__", ())
    console.print("; ".join([message, *notes]), markup=False)
