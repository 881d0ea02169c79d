"""The verification and rollback state machine: plain data, deterministic, no I/O and no clock."""

from pipespec.state.finish import FinishChecker, cut_at_stop
from pipespec.state.journal import Journal
from pipespec.state.request import RequestState
from pipespec.state.stage import Decision, StageState
from pipespec.state.step import Role, Step

__all__ = [
    "Decision",
    "FinishChecker",
    "Journal",
    "RequestState",
    "Role",
    "StageState",
    "Step",
    "cut_at_stop",
]
