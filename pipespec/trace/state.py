"""The protocol core of a stage, telling a `Tracer` what it does.

It changes nothing: every method does what that of `StageState` does, and notes how long that took
and what came of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pipespec.messages import Draft, Frame, Link, Verdict
from pipespec.policy import Policy
from pipespec.state import Decision, Role, StageState
from pipespec.state.finish import Decode
from pipespec.state.outcomes import Ranked
from pipespec.state.request import RequestState
from pipespec.trace.events import APPLY, DECIDE, ROLLBACK, WAIT, Tracer


class TracedState(StageState):
    """A `StageState` whose events are noted. clock: the one that times its forwards."""

    def __init__(
        self,
        role: Role,
        policy: Policy,
        incarnations: Sequence[int],
        *,
        decode: Decode | None = None,
        max_active: int = 1 << 30,
        tracer: Tracer,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(role, policy, incarnations, decode=decode, max_active=max_active)
        self._tracer = tracer
        self._clock = clock

    def receive(self, link: Link, frame: Frame, now_s: float) -> list[tuple[Link, Frame]]:
        message = frame.message
        request = self.requests.get(getattr(message, "request", -1))
        before = None if request is None else _Counted(request)
        start_s = self._clock()
        frames = super().receive(link, frame, now_s)
        end_s = self._clock()
        name = f"receive {type(message).__name__}"
        args = describe(frame)
        if request is not None and isinstance(message, Verdict):
            args["ahead"] = len(request.seq) - request.acked
        self._tracer.add(name, start_s, end_s, flow_of(frame), **args)
        if request is not None and before is not None:
            self._note_rollback(request, before, end_s)
        return frames

    def decide(self, now_s: float) -> Decision:
        start_s = self._clock()
        decision = super().decide(now_s)
        if decision.step is not None:
            self._tracer.add(DECIDE, start_s, self._clock())
        return decision

    def end_step(
        self, draws: Sequence[Ranked], start_s: float, end_s: float
    ) -> list[tuple[Link, Frame]]:
        request = self._in_flight
        assert request is not None and request.step is not None
        is_wanted = self.requests.get(request.request) is request
        before = _Counted(request)
        earlier, last = tuple(request.burst.steps), request.step
        begin_s = self._clock()
        frames = super().end_step(draws, start_s, end_s)
        self._tracer.add(APPLY, begin_s, self._clock())
        steps = (*earlier, last)
        first, counts = steps[0], request.counts
        args: dict[str, Any] = {
            "request": request.request,
            "position": before.length,
            "fed": sum(step.query_length for step in steps),
            "emitted": len(request.seq) - before.length if is_wanted else 0,
        }
        if first.is_prefill:
            name = "prefill"
        else:
            name = "verify" if not self.role.is_first else "draft" if first.ids else "prepare"
        if name == "verify":
            args["offered"] = first.num_candidates + len(first.twigs)
            args["accepted"] = counts.accepted[-1] if is_wanted else 0
        if len(steps) > 1:
            args["forwards"] = len(steps)
        if prepared := sum(len(step.branches) for step in steps):
            args["prepared"] = prepared
        if counts.num_discarded_steps > before.num_discarded:
            args["overtaken"] = True
        if not is_wanted:
            args["after_end"] = True
        if not self.role.is_last:
            args["ahead"] = len(request.seq) - request.acked
        self._tracer.add(name, start_s, end_s, **args)
        return frames

    def add_wait(self, seconds: float) -> None:
        super().add_wait(seconds)
        if self.requests:
            now_s = self._clock()
            self._tracer.add(WAIT, now_s - seconds, now_s)

    def _note_rollback(self, request: RequestState, before: _Counted, now_s: float) -> None:
        num_removed = request.counts.num_rolled_back - before.num_rolled_back
        if num_removed:
            self._tracer.add(
                ROLLBACK,
                now_s,
                now_s,
                request=request.request,
                position=before.length - num_removed,
                tokens=num_removed,
                foreseen=request.counts.num_outcome_hits > before.num_hits,
            )


class _Counted:
    """How far a request is."""

    __slots__ = ("length", "num_discarded", "num_hits", "num_rolled_back")

    def __init__(self, request: RequestState) -> None:
        counts = request.counts
        self.length = len(request.seq)
        self.num_discarded = counts.num_discarded_steps
        self.num_hits = counts.num_outcome_hits
        self.num_rolled_back = counts.num_rolled_back


def flow_of(frame: Frame) -> str:
    """What names a Draft or a Verdict at both ends: its sender numbers the frames of each link."""
    kind = type(frame.message)
    if kind is not Draft and kind is not Verdict:
        return ""
    arrow = ">" if kind is Draft else "<"
    return f"{frame.sender}{arrow}{frame.incarnation}.{frame.sequence}"


def describe(frame: Frame) -> dict[str, Any]:
    """What is shown of a message that was sent or received."""
    message = frame.message
    if isinstance(message, Draft):
        num_prepared = len(message.parents)
        args = {"request": message.request, "position": message.start, "tokens": message.num_own}
        return {**args, "prepared": num_prepared} if num_prepared else args
    if isinstance(message, Verdict):
        return {
            "request": message.request,
            "position": message.start,
            "tokens": len(message.tokens),
        }
    return {}
