"""The loop of one stage: drain messages, decide, one forward, send.

Knows frames, steps and slots. Does not know ZMQ, models, acceptance or the time source: transport,
runner and clock are handed in, so the same loop runs in a process of its own and in tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence

from pipespec.config import Schedule
from pipespec.errors import StageError
from pipespec.messages import Frame, Heartbeat, Link, Shutdown
from pipespec.policy import make_policy
from pipespec.runners.base import ModelRunner, Row
from pipespec.state import Role, StageState, Step
from pipespec.state.finish import Decode
from pipespec.transport import Transport

DUTIES_S = 1.0
SEND_TIMEOUT_S = 30.0


class StageLoop:
    """Runs one stage until a `Shutdown` arrives.

    num_slots: requests that the runner can hold at a time. The transport's neighbours are processes
    of the incarnations given (all 1 when a pipeline starts).
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
    ) -> None:
        context_length = runner.info.context_length
        ahead = schedule.run_ahead
        role = Role(index, num_stages, ahead, ahead, context_length=context_length)
        policy = make_policy(schedule, is_first=role.is_first)
        self.state = StageState(role, policy, incarnations, decode=decode, max_active=num_slots)
        self._slots = SlotTable(runner, num_slots)
        self._transport = transport
        self._clock = clock
        self._stopped = False
        self._next_duties_s = 0.0
        self._up_is_full = False

    def run(self) -> None:
        """Serves until told to stop; what the runner or the transport raises ends it."""
        wait_s = 0.0
        while not self._stopped:
            self._drain(wait_s)
            decision = self.state.decide(self._clock())
            if decision.step is not None:
                wait_s = 0.0
                self._forward(decision.step)
            else:
                wait_s = self._idle_s(decision.wake_at_s)

    def _drain(self, wait_s: float) -> None:
        start_s = self._clock()
        arrivals = self._transport.receive(wait_s)
        now_s = self._clock()
        if wait_s > 0.0:
            self.state.add_wait(now_s - start_s)
        for link, frame in arrivals:
            if isinstance(frame.message, Shutdown):
                self._stopped = True
            self._send(self.state.receive(link, frame, now_s))
        self._slots.keep_only(self.state.requests)

    def _forward(self, step: Step) -> None:
        sampling = self.state.requests[step.request].submit.sampling
        slot = self._slots.slot_of(step.request)
        row = Row(slot, step.start, step.ids, step.num_candidates + 1, sampling)
        start_s = self._clock()
        draws = self._slots.runner.forward([row])[0]
        end_s = self._clock()
        self._drain(0.0)  # a verdict that overtook the forward saves sending dead drafts
        self._send(self.state.end_step(draws, start_s, end_s))

    def _idle_s(self, wake_at_s: float | None) -> float:
        """Seconds to wait for a message; on the way, the once-a-second duties."""
        now_s = self._clock()
        if now_s >= self._next_duties_s:
            self._next_duties_s = now_s + DUTIES_S
            self._send(self.state.wrap([(Link.LAUNCHER, Heartbeat("serving", self._counters()))]))
            if self._up_is_full:
                self._up_is_full = False
                self._send(self.state.full_verdicts())
            self._send(self.state.refresh(now_s))
        until_s = self._next_duties_s
        if wake_at_s is not None:
            until_s = min(until_s, wake_at_s)
        return max(0.0, until_s - now_s)

    def _counters(self) -> dict[str, int]:
        return {
            "num_malformed": self._transport.num_malformed,
            "num_old_frames": self.state.links.num_old_frames,
            "num_unknown": self.state.num_unknown,
        }

    def _send(self, frames: list[tuple[Link, Frame]]) -> None:
        """A stage never waits for a neighbour. A full link loses a Draft, which was a hint, and
        turns lost Verdicts into a full one as soon as it takes frames again."""
        for link, frame in frames:
            if link is Link.UP and self._up_is_full:
                continue
            if self._transport.send(link, frame):
                continue
            if link is Link.UP:
                self._up_is_full = True
            elif link is Link.LAUNCHER:
                self._insist(frame)

    def _insist(self, frame: Frame) -> None:
        """Output must not be lost; a launcher that reads nothing for long is stuck or gone."""
        deadline_s = self._clock() + SEND_TIMEOUT_S
        while not self._transport.send(Link.LAUNCHER, frame):
            if self._clock() > deadline_s:
                raise StageError(f"the launcher took no message for {SEND_TIMEOUT_S:.0f} s")
            time.sleep(0.05)


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
