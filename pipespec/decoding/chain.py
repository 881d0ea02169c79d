"""Synchronous speculative decoding with k models: the protocol core stepped in one process.

No clock and no waiting: of all stages that may step, the one nearest to the target does, so a
stage drafts only while nobody after it has enough to verify. Sources: Leviathan et al.,
arXiv 2211.17192; for k models, PipeSpec's baseline, arXiv 2505.01572.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, Self

from pipespec.config import GenerationParams, Schedule
from pipespec.decoding.base import Batch, Generation, OnText, OnTokens, Prompt, Session
from pipespec.decoding.greedy import DEFAULTS
from pipespec.decoding.hierarchy import Hierarchy
from pipespec.decoding.local import close_all, load_runners, pinned
from pipespec.errors import UsageError
from pipespec.forwards import run_step
from pipespec.messages import LAUNCHER, Abort, Finish, Frame, Link, Message, Output, Stats, Submit
from pipespec.policy import FIRST_MOST, make_policy
from pipespec.state import Role, StageState, Step
from pipespec.trace import OnTrace, StrategyTrace, TracedState, Tracer
from pipespec.trace.state import describe, flow_of

Delivery = tuple[int, Link, Frame]


class ChainSpeculativeDecoder:
    """Drafts `schedule.lookahead` tokens (None: as many as pay), verifies them, starts again.

    On the CPU all models share the target's cores: one process does one thing at a time. on_trace:
    is told at the end what each model did.
    """

    strategy = "chain"

    def __init__(
        self,
        hierarchy: Hierarchy,
        schedule: Schedule | None = None,
        *,
        on_trace: OnTrace | None = None,
    ) -> None:
        self.hierarchy = hierarchy
        schedule = schedule or Schedule()
        if len(hierarchy.models) < 2:
            raise UsageError(
                "--strategy chain needs a draft and a target; the config has one model"
            )
        _check_lookahead(schedule)
        self._placement = hierarchy.in_process(len(hierarchy.models) - 1)
        with pinned(self._placement):
            self._runners = load_runners(hierarchy, ranges=on_trace is not None)
        self._inbox: deque[Delivery] = deque()
        self._stats: dict[int, dict[str, Any]] = {}
        self._session = Session(self)
        self._on_trace = on_trace
        self._tracers = [Tracer() for _ in hierarchy.models] if on_trace is not None else []
        self.use(schedule)

    def use(self, schedule: Schedule) -> None:
        """Goes on by another schedule, with the models that are loaded; what was measured of them
        is forgotten. Between two texts.

        Raises:
            UsageError: a lookahead of 0.
        """
        _check_lookahead(schedule)
        self.schedule = schedule
        num_stages = len(self._runners)
        ahead = schedule.lookahead or min(schedule.run_ahead, FIRST_MOST)
        roles = [
            Role(i, num_stages, ahead, ahead, context_length=runner.info.context_length)
            for i, runner in enumerate(self._runners)
        ]
        self._states = [self._state(role, schedule) for role in roles]

    def _state(self, role: Role, schedule: Schedule) -> StageState:
        policy = make_policy(schedule, is_first=role.is_first, overlaps=False)
        incarnations, decode = [1] * role.num_stages, self.hierarchy.tokenizer.decode
        if self._tracers:
            tracer = self._tracers[role.index]
            return TracedState(role, policy, incarnations, decode=decode, tracer=tracer)
        return StageState(role, policy, incarnations, decode=decode)

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams = DEFAULTS,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        return self._session.generate(prompt, params, on_text, on_tokens)

    def stream(self, prompt: Prompt, params: GenerationParams = DEFAULTS) -> Iterator[str]:
        return self._session.stream(prompt, params)

    def close(self) -> None:
        close_all(self._runners)
        on_trace, self._on_trace = self._on_trace, None
        if on_trace is not None:
            pairs = zip(self._tracers, self.hierarchy.models)
            stages = tuple(tracer.trace(model.name) for tracer, model in pairs)
            on_trace(StrategyTrace(self.strategy, stages))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def run(self, submit: Submit) -> Generator[Batch, None, None]:
        self._stats = {}
        closing: Message = Abort(submit.request)
        try:
            with pinned(self._placement):
                self._tell_target(submit)
                while isinstance(closing, Abort):
                    for output in self._deliver():
                        if output.finish_reason:
                            closing = Finish(submit.request)
                        yield Batch(output.tokens, output.finish_reason, output.verifications)
                    if isinstance(closing, Abort):
                        self._step_once()
        finally:
            self._tell_target(closing)
            self._deliver()
            for runner in self._runners:
                runner.release(0)

    def last_counts(self) -> list[dict[str, Any]]:
        return [self._stats[index] for index in range(len(self._states))]

    def _step_once(self) -> None:
        """One forward of the stage nearest to the target that can do one."""
        now_s = time.perf_counter()
        for index in reversed(range(len(self._states))):
            if index == 0:  # no more than the next stage waits for
                self._states[0].role.batch = max(1, self._states[1].num_missing(now_s))
            step = self._states[index].decide(now_s).step
            if step is not None:
                self._forward(index, step)
                return
        raise AssertionError("no stage can step: the protocol has stalled")

    def _forward(self, index: int, step: Step) -> None:
        state = self._states[index]
        start_s = time.perf_counter()
        draws = run_step(state, self._runners[index], 0, step)
        end_s = time.perf_counter()
        self._post(index, state.end_step(draws, start_s, end_s))
        self._post(index, state.learn())

    def _deliver(self) -> list[Output]:
        """Passes messages on until none is left; returns what the target put out."""
        outputs: list[Output] = []
        while self._inbox:
            index, link, frame = self._inbox.popleft()
            if link is not Link.LAUNCHER or frame.sender == LAUNCHER:
                self._post(index, self._states[index].receive(link, frame, time.perf_counter()))
            elif isinstance(frame.message, Output):
                outputs.append(frame.message)
            elif isinstance(frame.message, Stats):
                self._stats[index] = frame.message.values
        return outputs

    def _post(self, index: int, frames: list[tuple[Link, Frame]]) -> None:
        """What stage `index` sends arrives at the other end of the link."""
        for link, frame in frames:
            if link is Link.UP:
                self._inbox.append((index - 1, Link.DOWN, frame))
            elif link is Link.DOWN:
                self._inbox.append((index + 1, Link.UP, frame))
            else:
                self._inbox.append((index, Link.LAUNCHER, frame))
            if self._tracers:
                name, now_s = f"send {type(frame.message).__name__}", time.perf_counter()
                flow, args = flow_of(frame), describe(frame)
                self._tracers[index].add(name, now_s, time.perf_counter(), flow, **args)

    def _tell_target(self, message: Message) -> None:
        last = len(self._states) - 1
        self._inbox.append((last, Link.LAUNCHER, Frame(LAUNCHER, 1, 1, 0, message)))


def _check_lookahead(schedule: Schedule) -> None:
    if schedule.lookahead == 0:
        raise UsageError("--lookahead 0 is for async-chain; chain drafts at least 1 token")
