"""Ctrl-C, SIGTERM and SIGHUP in the program that holds a pipeline: when they may strike.

A library must not change what a signal does to its user's program, except for the moments in which
an exception would lose track of a process. Commands go further and turn a request to end into an
exception, so that everything is closed on the way out.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

_TO_END: Final = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Within it, Ctrl-C and the signals that a program handles by an exception wait until its end.

    For steps that are short and must be done whole: a process that runs but is not written down
    yet would be nobody's. Does nothing outside the main thread, where no signal strikes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    # Ctrl-C last: what it raises while handlers are given back finds the others in place.
    held = {
        number: handler
        for number in (*_TO_END, signal.SIGINT)
        if callable(handler := signal.getsignal(number))
    }
    try:
        for number in held:
            signal.signal(number, lambda number, _frame: arrived.append(number))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for came in arrived:
            signal.raise_signal(came)


@contextlib.contextmanager
def install_signal_handlers() -> Iterator[None]:
    """For commands: within it, SIGTERM and SIGHUP end the program as `sys.exit` would, so that
    every `with` and `finally` runs. Later ones are ignored: cleaning up is under way."""
    assert threading.current_thread() is threading.main_thread()

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in previous:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {number: signal.getsignal(number) for number in _TO_END}
    try:
        for number in previous:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
