"""The tracker that a command's flags ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipespec.errors import UsageError
from pipespec.tracking import NullTracker, Tracker

_ONLY_WITH_WANDB = ("wandb_project", "wandb_entity", "wandb_run")


@contextmanager
def open_tracker(
    options: argparse.Namespace, strategies: Sequence[str], say: Callable[[str], None]
) -> Iterator[Tracker]:
    """Of the flags of `add_tracking_arguments`. say: tells the user a line.

    Raises:
        UsageError: naming the flag, where W&B is not installed or nobody is logged in.
    """
    if not options.use_wandb:
        for name in _ONLY_WITH_WANDB:
            if getattr(options, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} does nothing without --use-wandb; add that")
        yield NullTracker()
        return
    from pipespec.tracking.wandb_runs import WandbOptions, open_wandb

    wandb_options = WandbOptions(
        project=options.wandb_project,
        entity=options.wandb_entity,
        name=options.wandb_run,
        is_group=len(strategies) > 1,
    )
    with open_wandb(wandb_options, say) as tracker:
        yield tracker


def tracking_folder(output_dir: Path) -> Path:
    """Where W&B's folder `wandb` goes: beside the results, or where W&B is told to put it."""
    return Path(os.environ.get("WANDB_DIR") or output_dir)
