"""From an error to one line on stderr and an exit code, for every command.

Notes on an exception (`add_note`) say what was kept; they follow its message on the same line.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console

from pipespec.errors import PipeSpecError, StageError
from pipespec.interrupts import install_signal_handlers

EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_TAIL_LINES: Final = 20


def run_command(body: Callable[[], int]) -> int:
    """Runs a command to its exit code; SIGTERM and SIGHUP unwind it like an exception.

    A failed stage's last log lines are printed below the error's line.
    """
    try:
        try:
            return _exit_code(body)
        finally:
            if sys.stdout is not None:  # closed by whoever started the command
                sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        _discard_output()
        _report(f"error: {error.strerror}, while writing {error.filename or 'the output'}", error)
        return PipeSpecError.exit_code


class CommandConsole(Console):
    """A console that tells of a reader who has left by a `BrokenPipeError`, as files do."""

    def on_broken_pipe(self) -> None:
        """rich's own ends the program with exit code 1, as if the command had failed."""
        raise  # the error that rich is handling


def print_line(console: Console, text: str) -> None:
    """Prose, in which a terminal would break words at its edge: there it is wrapped between words.
    A word that is longer than a line, such as a path, stays whole; elsewhere the line does too."""
    if console.is_terminal:
        lines = (
            textwrap.wrap(line, console.width, break_long_words=False, break_on_hyphens=False)
            for line in text.splitlines()
        )
        text = "\n".join("\n".join(line) for line in lines)
    console.print(text, markup=False, soft_wrap=True)


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


def _exit_code(body: Callable[[], int]) -> int:
    """Runs the body; what it raises is reported."""
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


def _report(message: str, error: BaseException | None = None) -> None:
    """A line on stderr; where that cannot be written, the exit code alone has to tell."""
    console = CommandConsole(stderr=True, soft_wrap=True, highlight=False)
    notes = getattr(error, "__notes__", ())
    try:
        print_line(console, "; ".join([message, *notes]))
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """What cannot be written is dropped, or the interpreter would try again, and complain, at its
    exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(null, stream.fileno())
    os.close(null)
