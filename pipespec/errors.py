"""Every error that PipeSpec raises for its users, and the exit code that each one means.

    PipeSpecError                 1
    |- UsageError                 2   a flag, file or value the user can change
    |  |- ConfigError             2   a models config
    |  |- DataError               2   a data set, a prompt or a result file
    |  |  `- NothingLeftError     1   of several files, none could be used
    |  `- ModelLoadError          2   weights, tokenizer or device that is missing or does not fit
    |- StageError                 1   a stage process failed, died or did not answer in time
    `- ProtocolError              1   a message that does not follow the wire protocol

The text of a `PipeSpecError` is one line that names the flag, file or stage and says what to do.
Internal invariants are `assert`s, not errors.
"""

from __future__ import annotations


class PipeSpecError(Exception):
    """Base of all errors that a command turns into one line on stderr and an exit code."""

    exit_code = 1


class UsageError(PipeSpecError):
    """Something the user passed cannot work; nothing was started or lost."""

    exit_code = 2


class ConfigError(UsageError):
    """A models config that is not readable, has an unknown key, or asks for what does not exist."""


class DataError(UsageError):
    """A data set that is missing, empty or of an unknown shape, or a prompt that is too long."""


class NothingLeftError(DataError):
    """Files were passed over one by one, each with its reason, until none was left."""

    exit_code = 1


class ModelLoadError(UsageError):
    """Weights, a tokenizer or a device that a config names and this machine does not have."""


class StageError(PipeSpecError):
    """A stage failed. `log_tail` holds the last lines of its log, oldest first."""

    def __init__(self, message: str, log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.log_tail = log_tail


class ProtocolError(PipeSpecError):
    """A frame that is malformed, of another version, or out of range. Counted, never acted on."""
