"""What the target has committed, as the launcher knows it: the root of all recovery.

State flows from here upwards only. The journal takes `Output` of the target's current incarnation;
raising the incarnation first and reading the journal second is what makes a restarted target
continue exactly where the text stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipespec.errors import StageError
from pipespec.messages import Output


@dataclass(slots=True)
class JournalEntry:
    """Committed output of one request."""

    prompt_len: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


class Journal:
    """Committed output of every request in flight."""

    def __init__(self) -> None:
        self.incarnation = 1
        self.num_fenced = 0
        self.entries: dict[int, JournalEntry] = {}

    def open(self, request: int, prompt_len: int) -> None:
        self.entries[request] = JournalEntry(prompt_len)

    def close(self, request: int) -> None:
        """The request is over; late output of it means nothing."""
        self.entries.pop(request, None)

    def fence(self) -> int:
        """The target is dead: refuse what it may still have in flight. The next incarnation."""
        self.incarnation += 1
        return self.incarnation

    def on_output(self, output: Output, incarnation: int) -> tuple[int, ...]:
        """Commits what a target of this incarnation says; returns the tokens that are new.

        Raises:
            StageError: if the target contradicts or skips what it has committed before.
        """
        if incarnation < self.incarnation:
            self.num_fenced += 1
            return ()
        entry = self.entries.get(output.request)
        if entry is None:
            return ()
        offset = output.start - entry.prompt_len
        if not 0 <= offset <= len(entry.tokens):
            raise StageError(f"the target skipped output of request {output.request}")
        known = entry.tokens[offset:]
        if tuple(known) != output.tokens[: len(known)]:
            raise StageError(f"the target changed committed output of request {output.request}")
        new = output.tokens[len(known) :]
        entry.tokens.extend(new)
        entry.finish_reason = entry.finish_reason or output.finish_reason
        return new
