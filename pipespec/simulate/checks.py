"""What must hold besides equal text.

The target commits only its own draws, so nearly any protocol bug still gives the right text. These
checks see what the text hides: whose prefix a candidate was drafted on, on which context a draw was
made, what the KV cache really holds, how far ahead a stage runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipespec.emulation import Oracle
from pipespec.messages import Draft
from pipespec.state.request import RequestState, Step


class InvariantViolation(AssertionError):
    """The protocol broke one of its promises; the text names it."""


def check(holds: bool, promise: str) -> None:
    if not holds:
        raise InvariantViolation(promise)


def check_step(request: RequestState, step: Step, kv: Sequence[int]) -> None:
    """At the start of a forward."""
    context = request.seq + request.cands[: step.num_candidates]
    check(list(kv[: step.start]) == request.seq[: step.start], "KV ids equal the prefix")
    check(len(kv) >= step.start, "KV holds what the step builds on")
    check(list(step.ids) == context[step.start :], "a step feeds the prefix and its candidates")
    check(step.base <= len(request.seq), "a step draws the next own token")
    check(step.num_candidates < max(1, request.room), "a step stays within the room")


def check_draws(request: RequestState, num_before: int, oracle: Oracle) -> None:
    """After a forward: every token it added is the model's choice for the prefix before it."""
    for position in range(num_before, len(request.seq)):
        expected = oracle.draw(request.hashes[position])
        check(request.seq[position] == expected, "draws are used only on their own context")


def check_candidates(
    request: RequestState, before: Sequence[int], draft: Draft, ghost: Sequence[int]
) -> None:
    """After a Draft. `ghost`: the whole sequence of the drafter, which no real Draft carries."""
    if request.cands == list(before):
        return
    held = request.seq + request.cands
    drafted = [*ghost[: draft.start], *draft.tokens]
    check(held == drafted[: len(held)], "a candidate was drafted on the prefix it follows")


def check_caps(request: RequestState, *, reliable: bool) -> None:
    """After every transition."""
    role = request.role
    check(len(request.cands) <= role.max_candidates, "candidates stay within the cap")
    if not role.is_last:
        check(request.sent <= request.acked + role.run_ahead, "sent drafts stay within run-ahead")
        check(request.sent <= len(request.seq), "only own tokens are sent")
    if reliable:
        check(request.counts.num_overflows == 0, "nobody sends more than the next stage takes")
        check(request.counts.num_dropped_verdicts == 0, "no verdict is out of order")


def check_hashes(request: RequestState) -> None:
    """The incremental hashes name the sequence (checked at the end: it costs O(sequence))."""
    from pipespec.hashing import hash_tokens

    check(len(request.hashes) == len(request.seq) + 1, "one hash for each prefix")
    check(request.hashes[-1] == hash_tokens(request.seq), "hashes name the sequence")
