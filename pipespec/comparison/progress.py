"""Where a race stands: one line that changes on a terminal, lines elsewhere. Redrawn when there is
news and never during a turn, because a thread that redraws would take its time from a contestant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, TextColumn


@contextlib.contextmanager
def showing(console: Console) -> Iterator[Callable[[str], None]]:
    """The value shows a text in place of the former one."""
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, soft_wrap=True)
        return
    column = TextColumn("{task.description}", markup=False)
    with Progress(column, console=console, auto_refresh=False, transient=True) as bars:
        task = bars.add_task("")
        yield lambda text: bars.update(task, description=text, refresh=True)
