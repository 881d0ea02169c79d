"""The baseline: the target alone, one token a forward. Knows nothing of drafts or verdicts."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any, Self

from pipespec.config import GenerationParams
from pipespec.decoding.base import Batch, Generation, OnText, OnTokens, Prompt, Session
from pipespec.decoding.hierarchy import Hierarchy
from pipespec.decoding.local import close_all, load_runners, pinned
from pipespec.messages import Submit
from pipespec.runners.base import Row
from pipespec.state import FinishChecker, Step
from pipespec.state.counts import Counts
from pipespec.trace import OnTrace, StrategyTrace, Tracer

DEFAULTS = GenerationParams()


class GreedyDecoder:
    """Decodes with the last model of the hierarchy, in this process.

    The name is the original's; it samples as well when the parameters say so, and is the reference
    for what every other strategy must write. on_trace: is told at the end what the target did.
    """

    strategy = "greedy"

    def __init__(self, hierarchy: Hierarchy, *, on_trace: OnTrace | None = None) -> None:
        self.hierarchy = hierarchy.target_only
        self._placement = self.hierarchy.in_process(0)
        with pinned(self._placement):
            self._runners = load_runners(self.hierarchy, ranges=on_trace is not None)
        self._counts = Counts()
        self._session = Session(self)
        self._on_trace = on_trace
        self._tracer = Tracer() if on_trace is not None else None

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
        if on_trace is not None and self._tracer is not None:
            stages = (self._tracer.trace(self.hierarchy.models[0].name),)
            on_trace(StrategyTrace(self.strategy, stages))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def run(self, submit: Submit) -> Generator[Batch, None, None]:
        runner, self._counts = self._runners[0], Counts()
        check = FinishChecker(submit, self.hierarchy.tokenizer.decode)
        position, ids, reason = 0, submit.prompt, ""
        try:
            with pinned(self._placement):
                while not reason:
                    start_s = time.perf_counter()
                    token = runner.forward([Row(0, position, ids, 1, submit.sampling)])[0][0]
                    end_s = time.perf_counter()
                    step = Step(submit.request, position, ids, 0, is_prefill=position == 0)
                    self._counts.log_step([step], 0, 1, start_s, end_s)
                    if self._tracer is not None:
                        self._note(step, start_s, end_s)
                    reason = check(token)
                    yield Batch((token,), reason)
                    position, ids = position + len(ids), (token,)
        finally:
            runner.release(0)

    def _note(self, step: Step, start_s: float, end_s: float) -> None:
        assert self._tracer is not None
        self._tracer.add(
            "prefill" if step.is_prefill else "decode",
            start_s,
            end_s,
            request=step.request,
            position=step.end,
            fed=len(step.ids),
            emitted=1,
        )

    def last_counts(self) -> list[dict[str, Any]]:
        return [self._counts.to_values()]
