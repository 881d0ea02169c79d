"""Experiment tracking: which numbers of a run are logged under which keys, and where to.

`keys` is the one table of all keys, `tables` makes what is logged as a table, `tracker` is the seam
that commands call, and `wandb_runs` logs to Weights & Biases. Nothing here generates or measures.
"""

from pipespec.tracking.tracker import NullTracker, RunTracker, Tracker

__all__ = ["NullTracker", "RunTracker", "Tracker"]
