"""A child process's last resort: it ends when its parent is gone, whatever it does meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

WATCH_INTERVAL_S: Final = 0.5


def end_with_parent(
    parent_pid: int,
    interval_s: float = WATCH_INTERVAL_S,
    on_end: Callable[[], None] = lambda: None,
) -> None:
    """Ends this process soon after `parent_pid` is gone, or after whoever started it is, after
    calling `on_end`. A thread looks now and then."""
    starter_pid = os.getppid()

    def watch() -> None:
        while os.getppid() == starter_pid and is_alive(parent_pid):
            time.sleep(interval_s)
        on_end()
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def is_alive(pid: int) -> bool:
    """Whether there is such a process, of whatever user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
