"""A discrete-event scheduler for pipelines: virtual clock, links with delay, crashes, restarts.

Time is in seconds of the virtual clock. With no randomness and zero delay the tokens per second of
a run are the *ideal throughput* of a pipeline: same policy, same tokens, nothing between the steps.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from pipespec.emulation import Oracle, TokenOracle
from pipespec.errors import StageError
from pipespec.messages import (
    LAUNCHER,
    Draft,
    Finish,
    Frame,
    Link,
    Message,
    Output,
    Stats,
    Submit,
    Verdict,
)  # fmt: skip
from pipespec.simulate import checks
from pipespec.simulate.cache import Cache
from pipespec.simulate.setup import Delivery, Faults, Report, SimStage
from pipespec.state.journal import Journal
from pipespec.state.outcomes import Ranked
from pipespec.state.request import RequestState
from pipespec.state.stage import StageState
from pipespec.state.step import Step

MAX_EVENTS = 200_000  # and as many again for each thousand tokens of output
TICK_S = 2.0
STALL_S = 10.0
SAME_MOMENT_S = 1e-9


@dataclass(slots=True)
class _Process:
    """One incarnation of a stage."""

    state: StageState
    oracle: TokenOracle
    is_up: bool = True
    is_busy: bool = False  # with what its loop does beside forwards
    step: Step | None = None
    draws: list[Ranked] = field(default_factory=list)
    step_start_s: float = 0.0
    step_end_s: float = 0.0
    inbox: list[Delivery] = field(default_factory=list)
    is_disturbed: bool = False  # something waits since the step began
    caches: dict[int, Cache] = field(default_factory=dict)


class Simulation:
    """Runs `submits` through `stages` until all are finished.

    jitter: scales a mean time to a random one (identity for a deterministic run). drain_first: what
    arrived during a forward is applied before its draws, not after them. in_turn: one forward at a
    time, of the stage nearest to the target that can do one, as `chain` does it; with no latency.
    start_s: the clock at the beginning.
    """

    def __init__(
        self,
        stages: Sequence[SimStage],
        submits: Sequence[Submit],
        *,
        latency_s: float = 0.0,
        seed: int = 0,
        jitter: bool = False,
        drain_first: bool = False,
        in_turn: bool = False,
        faults: Faults | None = None,
        verify: bool = True,
        start_s: float = 0.0,
    ) -> None:
        self.stages = stages
        self.submits = {submit.request: submit for submit in submits}
        self.report = Report()
        self._rng = random.Random(seed)
        self._latency_s = latency_s
        self._jitter = jitter
        self._drain_first = drain_first
        self._in_turn = in_turn
        self._faults = faults or Faults()
        self._verify = verify
        self._now_s = start_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._num_scheduled = 0
        num_tokens = sum(submit.max_new_tokens for submit in submits)
        self._max_events = MAX_EVENTS + MAX_EVENTS * num_tokens // 1000
        self._last_arrival_s: dict[tuple[int, int, int], float] = {}
        self._entered: set[int] = set()
        self._done: set[int] = set()
        self._journal = Journal()
        self._incarnations = [1] * len(stages)
        self._processes = [self._spawn(index) for index in range(len(stages))]

    def run(self) -> Report:
        """Raises InvariantViolation, naming the broken promise."""
        for submit in self.submits.values():
            self._journal.open(submit.request, len(submit.prompt))
            self._at(self._random_s(self._latency_s * 5), partial(self._enter, submit))
        last = len(self.stages) - 1
        if self._faults.any:
            for index in range(len(self.stages)):
                self._at(self._rng.random() * TICK_S, self._ticker(index))
        for _ in range(self._faults.num_crashes):
            self._at(self._rng.random() * 40, partial(self._crash, self._rng.randint(0, last)))
        # A faulty network ticks for ever; a reliable one runs until nothing is left to happen.
        while self._events and not (self._faults.any and len(self._done) == len(self.submits)):
            self._now_s, _, event = heapq.heappop(self._events)
            event()
            self._num_events += 1
            checks.check(self._num_events < self._max_events, "progress is made (no livelock)")
        checks.check(len(self._done) == len(self.submits), "no deadlock")
        if not self._faults.any:
            forgotten = all(not process.state.requests for process in self._processes)
            checks.check(forgotten, "every stage forgets a finished request")
        for request, entry in self._journal.entries.items():
            self.report.outputs[request] = list(entry.tokens)
        for process in self._processes:
            self.report.counts["old frames"] += process.state.links.num_old_frames
        for values in self.report.stats.values():
            self.report.counts["stale draft tokens"] += values["num_stale_drafts"]
            self.report.counts["overtaken steps"] += values["num_discarded_steps"]
        self.report.counts["fenced outputs"] = self._journal.num_fenced
        return self.report

    # -- time and links ---------------------------------------------------------------------

    def _at(self, delay_s: float, event: Callable[[], None]) -> None:
        self._at_time(self._now_s + delay_s, event)

    def _at_time(self, when_s: float, event: Callable[[], None]) -> None:
        self._num_scheduled += 1  # events of the same moment happen in the order they were made
        heapq.heappush(self._events, (when_s, self._num_scheduled, event))

    def _random_s(self, mean_s: float) -> float:
        return mean_s * self._rng.expovariate(1.0) if self._jitter else mean_s

    def _transmit(self, index: int, frames: list[tuple[Link, Frame]], cause: str = "") -> None:
        for link, frame in frames:
            self.report.counts[type(frame.message).__name__] += 1
            if link is Link.LAUNCHER:
                self._to_launcher(index, frame)
                continue
            target = index + (1 if link is Link.DOWN else -1)
            arrives_on = Link.UP if link is Link.DOWN else Link.DOWN
            ghost: tuple[int, ...] = ()
            if self._verify and isinstance(frame.message, Draft):
                request = self._processes[index].state.requests[frame.message.request]
                checks.check_draft(request, frame.message)
                ghost = tuple(request.seq)
            for _ in range(self._num_copies()):
                self._deliver(index, target, Delivery(arrives_on, frame, ghost, cause))

    def _num_copies(self) -> int:
        u = self._rng.random() if self._faults.any else 1.0
        if u < self._faults.loss:
            return 0
        return 2 if u < self._faults.loss + self._faults.duplication else 1

    def _deliver(self, source: int, target: int, item: Delivery) -> None:
        reordered = self._faults.reordering and self._rng.random() < self._faults.reordering
        channel = (source, target, item.frame.incarnation)
        when_s = self._now_s + self._random_s(self._latency_s)
        if self._faults.stalls and self._rng.random() < self._faults.stalls:
            when_s += self._random_s(STALL_S)
        if not reordered:
            when_s = self._in_order_s(channel, when_s)
        self._at_time(when_s, lambda: self._arrive(target, item))

    def _in_order_s(self, channel: tuple[int, int, int], when_s: float) -> float:
        """`when_s`, but never before what was sent earlier on the same channel."""
        when_s = max(when_s, self._last_arrival_s.get(channel, 0.0))
        self._last_arrival_s[channel] = when_s
        return when_s

    def _arrive(self, index: int, item: Delivery) -> None:
        process = self._processes[index]
        if not process.is_up:
            self.report.counts["lost at a dead stage"] += 1
            return
        process.inbox.append(item)
        if process.step is not None and not self.stages[index].reads_meanwhile:
            process.is_disturbed = True
        elif not process.is_busy:
            self._drain(index)
        self._act(index)

    # -- one stage --------------------------------------------------------------------------

    def _spawn(self, index: int) -> _Process:
        stage = self.stages[index]
        oracle, incarnation = stage.oracle, self._incarnations[index]
        if self._faults.unequal_target and index == len(self.stages) - 1:
            assert isinstance(oracle, Oracle)
            oracle = replace(oracle, seed=oracle.seed + incarnation - 1)
        return _Process(StageState(stage.role(), stage.policy(), self._incarnations), oracle)

    def _drain(self, index: int) -> None:
        process = self._processes[index]
        inbox, process.inbox = process.inbox, []
        for item in inbox:
            self._receive(index, item)

    def _receive(self, index: int, item: Delivery) -> None:
        state, message = self._processes[index].state, item.frame.message
        request = state.requests.get(getattr(message, "request", -1))
        if not self._verify or request is None:
            self._transmit(index, state.receive(item.link, item.frame, self._now_s))
            return
        paths, length = set(request.cands.paths()), len(request.seq)
        num_rollbacks = request.counts.num_rollbacks
        frames = state.receive(item.link, item.frame, self._now_s)
        if isinstance(message, Draft):
            checks.check_candidates(request, paths, message, item.ghost)
        if isinstance(message, Finish):
            checks.check_hashes(request)
        checks.check_caps(request, reliable=not self._faults.any)
        cause = "rollback" if request.counts.num_rollbacks > num_rollbacks else ""
        if isinstance(message, Verdict):
            self._count_case(message, item.cause, cause, length)
        self._transmit(index, frames, cause)

    def _count_case(self, verdict: Verdict, cause: str, effect: str, length: int) -> None:
        """The cases that a test suite of this protocol must have met."""
        counts = self.report.counts
        counts["rollbacks"] += effect == "rollback"
        counts["cascading rollbacks"] += cause == effect == "rollback"
        if cause == "bonus":
            counts["bonus tokens that differ from the run-ahead"] += effect == "rollback"
            ran_past = length >= verdict.start + len(verdict.tokens)
            counts["bonus tokens that match the run-ahead"] += ran_past and not effect

    def _act(self, index: int) -> None:
        if self._in_turn:
            # Once all that is said at this moment has been heard, by all stages.
            self._at(SAME_MOMENT_S, self._act_in_turn)
        else:
            self._step(index)

    def _act_in_turn(self) -> None:
        for index in reversed(range(len(self._processes))):
            if any(process.step is not None or process.is_busy for process in self._processes):
                return
            if index == 0 < len(self._processes) - 1:  # no more than the next stage waits for
                num_missing = self._processes[1].state.num_missing(self._now_s)
                self._processes[0].state.role.batch = max(1, num_missing)
            self._step(index)

    def _step(self, index: int) -> None:
        process = self._processes[index]
        if process.step is not None or process.is_busy or not process.is_up:
            return
        decision = process.state.decide(self._now_s)
        if decision.step is None:
            if decision.wake_at_s is not None:
                self._at_time(decision.wake_at_s, partial(self._act, index))
            return
        step = process.step = decision.step
        cache = process.caches.setdefault(step.request, Cache())
        request = process.state.requests[step.request]
        cache.keep(step.keep_start, step.keep)
        if self._verify:
            checks.check_step(request, step, cache)
        process.draws = self._draws(process.oracle, request, step, cache)
        process.step_start_s, process.is_disturbed = self._now_s, False
        self._forward(index, process)

    def _forward(self, index: int, process: _Process) -> None:
        step = process.step
        assert step is not None
        step_s = self._random_s(self.stages[index].step_s(step.query_length))
        process.step_end_s = self._now_s + step_s
        self._at(step_s, lambda: self._end_forward(index, process))

    def _end_forward(self, index: int, process: _Process) -> None:
        """The step goes on, or it is over."""
        if self._processes[index] is not process or not process.is_up:
            return
        if self._draws_on(process):
            self._forward(index, process)
        else:
            self._finish_step(index, process)

    def _draws(
        self, oracle: TokenOracle, request: RequestState, step: Step, cache: Cache
    ) -> list[Ranked]:
        """What the model ranks first after what the cache really holds, right or wrong."""
        hashes = [cache.feed(row, token, row - 1) for row, token in enumerate(step.ids, step.start)]
        for index, feed in enumerate(step.tail):
            if self._verify:
                checks.check_feed(request, step, index, cache)
            hashes.append(cache.feed(feed.row, feed.token, feed.parent_row))
        count = 1 + request.role.outcomes.num_ranked
        first = len(hashes) - step.num_draws - len(step.tail)
        return [tuple(oracle.ranked(prefix_hash, count)) for prefix_hash in hashes[first:]]

    def _draws_on(self, process: _Process) -> bool:
        """Draws for the next forward of the same step, if there is one."""
        step = None if process.is_disturbed else process.state.draw_on(process.draws)
        if step is None or process.step is None:
            return False
        request, cache = process.state.requests[step.request], process.caches[step.request]
        if self._verify:
            checks.check_next(request, process.step, step, process.draws)
        process.step = step
        process.draws = self._draws(process.oracle, request, step, cache)
        return True

    def _finish_step(self, index: int, process: _Process) -> None:
        if self._processes[index] is not process or not process.is_up:
            return
        step, process.step = process.step, None
        assert step is not None
        if self._drain_first:
            self._drain(index)
        request = process.state.requests.get(step.request)
        num_before = len(request.seq) if request is not None else 0
        frames = process.state.end_step(process.draws, process.step_start_s, process.step_end_s)
        cause = ""
        if self._verify and request is not None:
            checks.check_draws(request, num_before, process.oracle)
            checks.check_caps(request, reliable=not self._faults.any)
            is_bonus = 0 < step.num_candidates < len(request.seq) - num_before
            cause = "bonus" if is_bonus else ""
        self._transmit(index, frames, cause)
        self._drain(index)
        self._transmit(index, process.state.learn())
        between_s = self.stages[index].between_s
        if between_s:
            process.is_busy = True
            self._at(between_s, partial(self._end_loop, index, process))
        else:
            self._act(index)

    def _end_loop(self, index: int, process: _Process) -> None:
        """What followed from a forward was said when it ended; only now is the stage free."""
        process.is_busy = False
        if self._processes[index] is process and process.is_up:
            self._drain(index)
            self._act(index)

    # -- launcher, faults -------------------------------------------------------------------

    def _to_launcher(self, index: int, frame: Frame) -> None:
        message = frame.message
        if isinstance(message, Stats):
            self.report.stats[index, message.request] = message.values
        elif isinstance(message, Output):
            when_s = self._now_s + self._random_s(self._latency_s)
            when_s = self._in_order_s((index, LAUNCHER, frame.incarnation), when_s)
            self._at_time(when_s, lambda: self._commit(frame))

    def _commit(self, frame: Frame) -> None:
        message = frame.message
        assert isinstance(message, Output)
        try:
            self._journal.on_output(message, frame.incarnation)
        except StageError as error:
            raise checks.InvariantViolation(str(error)) from error
        entry = self._journal.entries[message.request]
        if entry.finish_reason and message.request not in self._done:
            self._done.add(message.request)
            self.report.end_s = self._now_s
            self._to_target(Finish(message.request))

    def _enter(self, submit: Submit) -> None:
        self._entered.add(submit.request)
        self._to_target(submit)

    def _to_target(self, message: Message) -> None:
        last = len(self.stages) - 1
        frame = Frame(LAUNCHER, 1, self._incarnations[last], 0, message)
        when_s = self._now_s + self._random_s(self._latency_s)
        when_s = self._in_order_s((LAUNCHER, last, self._incarnations[last]), when_s)
        self._at_time(when_s, lambda: self._arrive(last, Delivery(Link.LAUNCHER, frame)))

    def _crash(self, index: int) -> None:
        process = self._processes[index]
        if not process.is_up:
            return
        process.is_up = False
        self.report.counts["crashes"] += 1
        self._incarnations[index] += 1
        if index == len(self.stages) - 1:
            self._journal.fence()
        self._at(self._random_s(10.0), lambda: self._restart(index))

    def _restart(self, index: int) -> None:
        process = self._processes[index] = self._spawn(index)
        self._transmit(index, process.state.greet())
        if index == len(self.stages) - 1:
            for submit in self.submits.values():
                if submit.request in self._entered - self._done:
                    committed = tuple(self._journal.entries[submit.request].tokens)
                    self._to_target(replace(submit, committed=committed))
        self._act(index)

    def _ticker(self, index: int) -> Callable[[], None]:
        def tick() -> None:
            process = self._processes[index]
            if process.is_up:
                self._transmit(index, process.state.refresh(self._now_s))
                self._act(index)
            self._at(TICK_S, tick)

        return tick
