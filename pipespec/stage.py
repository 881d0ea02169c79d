"""The loop of one stage: drain messages, decide, one forward, send.

Knows frames, steps and slots. Does not know ZMQ, models, acceptance or the time source: transport,
runner and clock are handed in, so the same loop runs in a process of its own and in tests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Final, cast

from pipespec.config import Schedule
from pipespec.forwards import run_step
from pipespec.messages import Abort, Finish, Frame, Heartbeat, Link, Shutdown
from pipespec.policy import make_policy
from pipespec.runners.base import ModelRunner, WaitingRunner
from pipespec.state import Role, StageState, Step
from pipespec.state.finish import Decode
from pipespec.trace import TracedState, TracedTransport, Tracer
from pipespec.transport import Transport

DUTIES_S: Final = 1.0
RETRY_S: Final = 0.05  # until a full link is tried again


class StageLoop:
    """Runs one stage until a `Shutdown` arrives.

    num_slots: requests that the runner can hold at a time. The transport's neighbours are processes
    of the incarnations given (all 1 when a pipeline starts). tracer: is told what happens.
    """

    def __init__(
        self,
        *,
        index: int,
        num_stages: int,
        incarnations: Sequence[int],
        schedule: Schedule,
        runner: ModelRunner,
        transport: Transport,
        decode: Decode | None = None,
        num_slots: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        tracer: Tracer | None = None,
    ) -> None:
        info = runner.info
        role = Role.of(schedule, index, num_stages, info.context_length, info.num_tail_rows)
        policy = make_policy(schedule, is_first=role.is_first, is_last=role.is_last)
        self.state: StageState
        self._transport: Transport
        if tracer is None:
            self.state = StageState(role, policy, incarnations, decode=decode, max_active=num_slots)
            self._transport = transport
        else:
            self.state = TracedState(
                *(role, policy, incarnations),
                decode=decode,
                max_active=num_slots,
                tracer=tracer,
                clock=clock,
            )
            self._transport = TracedTransport(transport, tracer, clock)
        self._slots = SlotTable(runner, num_slots)
        self._incarnation = incarnations[index]
        self._clock = clock
        self._stopped = False
        self._next_duties_s = 0.0
        self._up_is_full = False
        self._unsent: dict[Link, deque[Frame]] = {Link.UP: deque(), Link.LAUNCHER: deque()}
        if info.frees_processor:
            cast(WaitingRunner, runner).while_computing(self._receive_for)

    def run(self) -> None:
        """Serves until told to stop; what the runner or the transport raises ends it."""
        self._drain(0.0)
        while not self._stopped:
            self._send(self.state.learn())
            decision = self.state.decide(self._clock())
            self._do_duties(is_idle=decision.step is None)
            if decision.step is not None:
                self._forward(decision.step)
            else:
                self._drain(self._idle_s(decision.wake_at_s))

    def _drain(self, wait_s: float) -> None:
        start_s = self._clock()
        arrivals = self._transport.receive(wait_s)
        now_s = self._clock()
        if wait_s > 0.0:
            self.state.add_wait(now_s - start_s)
        self._apply(arrivals, now_s)
        self._slots.keep_only(self.state.requests)

    def _apply(self, arrivals: Sequence[tuple[Link, Frame]], now_s: float) -> None:
        for link, frame in arrivals:
            if link is Link.LAUNCHER and isinstance(frame.message, Shutdown):
                self._stopped |= frame.receiver_incarnation == self._incarnation
            self._send(self.state.receive(link, frame, now_s))

    def _receive_for(self, seconds: float) -> None:
        """A device computes for so long: what arrives meanwhile is read now, not after it."""
        until_s = self._clock() + seconds
        while (left_s := until_s - self._clock()) > 0.0:
            # Long waits are counted in milliseconds (see transport), so they end early.
            wait_s = left_s if left_s < 0.01 else left_s - 0.002
            self._apply(self._transport.receive(wait_s), self._clock())

    def _forward(self, step: Step) -> None:
        slot, transport = self._slots.slot_of(step.request), self._transport
        start_s = self._clock()
        draws = run_step(
            self.state, self._slots.runner, slot, step, transport.descriptors, transport.has_frames
        )
        end_s = self._clock()
        if self.state.role.is_last:  # what it is sent can wait until its verdict is on its way
            self._send(self.state.end_step(draws, start_s, end_s))
            self._drain(0.0)
        else:  # a verdict that overtook the forward saves sending dead drafts
            self._drain(0.0)
            self._send(self.state.end_step(draws, start_s, end_s))

    def _idle_s(self, wake_at_s: float | None) -> float:
        """Seconds to wait for a message."""
        until_s = self._next_duties_s if wake_at_s is None else min(wake_at_s, self._next_duties_s)
        idle_s = max(0.0, until_s - self._clock())
        return min(idle_s, RETRY_S) if self._unsent[Link.LAUNCHER] else idle_s

    def _do_duties(self, *, is_idle: bool) -> None:
        """About once a second: what keeps links that lost frames alive, and the sign of life of a
        stage that has nothing to compute."""
        self._send_unsent(Link.LAUNCHER)
        now_s = self._clock()
        if now_s < self._next_duties_s:
            return
        self._next_duties_s = now_s + DUTIES_S
        if is_idle and not self._unsent[Link.LAUNCHER]:
            self._send(self.state.wrap([(Link.LAUNCHER, Heartbeat("serving", self._counters()))]))
        if self._up_is_full:
            self._up_is_full = not self._send_unsent(Link.UP)
            self._send(self.state.full_verdicts())
        self._send(self.state.refresh(now_s))

    def _counters(self) -> dict[str, int]:
        return {
            "num_malformed": self._transport.num_malformed,
            "num_old_frames": self.state.links.num_old_frames,
            "num_unknown": self.state.num_unknown,
        }

    def _send(self, frames: list[tuple[Link, Frame]]) -> None:
        """What a full link means: a Draft was a hint and is lost; Verdicts are lost too, until one
        full Verdict stands for them; the launcher's frames, and the end of a request, wait here. A
        request's output is bounded, so is what waits."""
        for link, frame in frames:
            if link is Link.LAUNCHER:
                self._unsent[link].append(frame)
                self._send_unsent(link)
            elif link is Link.UP and self._up_is_full:
                self._keep_end(frame)
            elif not self._transport.send(link, frame) and link is Link.UP:
                self._up_is_full = True
                self._keep_end(frame)

    def _keep_end(self, frame: Frame) -> None:
        if isinstance(frame.message, Finish | Abort):
            self._unsent[Link.UP].append(frame)

    def _send_unsent(self, link: Link) -> bool:
        """Sends what waits for a link, in order; False if the link is still full."""
        unsent = self._unsent[link]
        while unsent:
            if not self._transport.send(link, unsent[0]):
                return False
            unsent.popleft()
        return True


class SlotTable:
    """Which of the runner's slots holds which request."""

    def __init__(self, runner: ModelRunner, num_slots: int) -> None:
        self.runner = runner
        self._free = list(range(num_slots - 1, -1, -1))
        self._used: dict[int, int] = {}

    def slot_of(self, request: int) -> int:
        """The request's slot; a free one at its first step (the core bounds active requests)."""
        if request not in self._used:
            self._used[request] = self._free.pop()
        return self._used[request]

    def keep_only(self, requests: Container[int]) -> None:
        """Releases the slots of requests that are over."""
        for request in [key for key in self._used if key not in requests]:
            slot = self._used.pop(request)
            self.runner.release(slot)
            self._free.append(slot)
