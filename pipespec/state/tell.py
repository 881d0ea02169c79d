"""What a stage says of its own tokens: verdicts to the stage above, output to the launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipespec.messages import Link, Message, Output, Verdict

if TYPE_CHECKING:
    from pipespec.state.request import RequestState


def tell(request: RequestState, first_new: int, now_s: float) -> list[tuple[Link, Message]]:
    """Own tokens from `first_new` on are new."""
    outgoing: list[tuple[Link, Message]] = []
    if first_new == len(request.seq):
        return outgoing
    if not request.role.is_first and not request.role.is_alone:
        outgoing.append((Link.UP, _verdict(request, first_new)))  # somebody may wait for it
    is_due = now_s - request.output_at_s >= request.role.output_every_s
    if request.role.is_last and (is_due or request.finish_reason):
        tokens = tuple(request.seq[request.num_output :])
        output = Output(
            request.request, request.num_output, tokens, request.finish_reason, _steps(request)
        )
        outgoing.append((Link.LAUNCHER, output))
        request.num_output, request.output_at_s = len(request.seq), now_s
    return outgoing


def _steps(request: RequestState) -> tuple[int, ...]:
    """What came of the verifications since the last output."""
    counts, first = request.counts, request.num_steps_output
    request.num_steps_output = len(counts.emitted)
    steps = zip(counts.offered[first:], counts.accepted[first:], counts.emitted[first:])
    return tuple(number for step in steps for number in step)


def tell_kept(request: RequestState) -> list[tuple[Link, Message]]:
    """What a target that was alone has kept to itself."""
    num_kept = len(request.seq) - request.num_told
    return [(Link.UP, _verdict(request, request.num_told))] if num_kept else []


def tell_all(request: RequestState) -> list[tuple[Link, Message]]:
    """Everything a stage above needs to take part from nothing; idempotent."""
    if request.role.is_first:
        return []
    verdict = _verdict(request, request.prompt_len, is_full=True)
    return [(Link.UP, request.submit), (Link.UP, verdict)]


def _verdict(request: RequestState, first_new: int, *, is_full: bool = False) -> Verdict:
    """With what was kept back until now."""
    start = min(first_new, request.num_told)
    request.num_told = len(request.seq)
    request.num_verdicts_sent += 1
    tokens = tuple(request.seq[start:])
    return Verdict(request.request, request.num_verdicts_sent, start, tokens, is_full)
