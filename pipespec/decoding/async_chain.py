"""Asynchronous speculative decoding: every model its own process, nobody waits for a round trip.

This is the caller's side: it starts the processes, submits, and yields what the target commits.
The stages talk among themselves (`stage`, `state`). Source: PipeSpec, arXiv 2505.01572.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Final, NoReturn, Self, TypeVar

from pipespec.config import GenerationParams, Schedule
from pipespec.decoding.base import Batch, Generation, OnText, OnTokens, Prompt, Session
from pipespec.decoding.greedy import DEFAULTS
from pipespec.decoding.hierarchy import Hierarchy
from pipespec.errors import StageError, UsageError
from pipespec.launcher import WORKER, OnProgress, Pipeline
from pipespec.messages import Output, Stats, Submit
from pipespec.state import Journal
from pipespec.trace import OnTrace, StrategyTrace

STALL_S: Final = 1800.0  # no single forward that is worth waiting for takes longer
WAIT_S: Final = 2.0  # more than the time between two reports of an idle stage
MAX_IDLE_WAITS: Final = 5
T = TypeVar("T", Output, Stats)


class AsyncChainSpeculativeDecoder:
    """Starts one process a model and keeps them until `close`.

    Writes one text at a time. Ctrl-C within `generate`, or a stream that is not read to its end,
    gives up that text only; the next one starts at once.

    transport, ready_timeout_s, on_progress, command: see `Pipeline`. stall_timeout_s: how long a
    stage may compute without an answer. on_trace: is told at the end what all stages did, also
    after a failure; of a stage that was killed, up to the text before.
    """

    strategy = "async-chain"

    def __init__(
        self,
        hierarchy: Hierarchy,
        schedule: Schedule | None = None,
        *,
        transport: str = "ipc",
        ready_timeout_s: float = 600.0,
        stall_timeout_s: float = STALL_S,
        on_progress: OnProgress | None = None,
        on_trace: OnTrace | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        if len(hierarchy.models) < 2:
            raise UsageError(
                "--strategy async-chain needs a draft and a target; the config has one model"
            )
        self.hierarchy = hierarchy
        self.schedule = schedule or Schedule()
        self._stall_timeout_s = stall_timeout_s
        self._journal = Journal()
        self._stats: dict[int, dict[str, Any]] = {}
        self._open_request: int | None = None
        self._session = Session(self)
        self._on_trace = on_trace
        self.pipeline = Pipeline(
            hierarchy.models,
            hierarchy.placements,
            self.schedule,
            folders=hierarchy.folders,
            vocab_size=hierarchy.vocab_size,
            context_length=hierarchy.context_length,
            tokenizer_folders=hierarchy.tokenizer_folders,
            tokenizer_digest=hierarchy.tokenizer.digest,
            transport=transport,
            ready_timeout_s=ready_timeout_s,
            on_progress=on_progress,
            trace=on_trace is not None,
            command=command,
        )
        self.pipeline.start()

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
        on_trace, self._on_trace = self._on_trace, None
        try:
            self.pipeline.close()
        finally:
            if on_trace is not None:
                on_trace(StrategyTrace(self.strategy, self.pipeline.traces))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def run(self, submit: Submit) -> Generator[Batch, None, None]:
        """See `Engine.run`.

        Raises:
            StageError: a stage failed, computed for ever, or waits in vain.
            UsageError: another request was started before this one had ended.
        """
        self._give_up()  # what an interrupt or a forgotten stream left open
        request, self._stats = submit.request, {}
        self._open_request = request
        self._journal.open(request, len(submit.prompt))
        self.pipeline.submit(submit)
        try:
            yield from self._outputs(request)
            self._collect_stats(request)
        finally:
            if self._open_request == request:
                self._give_up()

    def last_counts(self) -> list[dict[str, Any]]:
        return [self._stats.get(index, {}) for index in range(len(self.hierarchy.models))]

    def _outputs(self, request: int) -> Iterator[Batch]:
        target = len(self.hierarchy.models) - 1
        while True:
            for output in self._await(Output, request, target):
                new = self._journal.on_output(output, self._journal.incarnation)
                yield Batch(new, output.finish_reason, output.verifications)
                if self._open_request != request:
                    raise UsageError(
                        "this text was given up: another one was started before it ended, and "
                        f"{self.strategy} writes one at a time"
                    )
                if output.finish_reason:
                    return

    def _collect_stats(self, request: int) -> None:
        """The text is complete: every stage forgets it and says what it did."""
        self.pipeline.finish(request)
        for stage in range(len(self.hierarchy.models)):
            while stage not in self._stats:
                self._await(Stats, request, stage)
        self._journal.close(request)
        self._open_request = None

    def _give_up(self) -> None:
        """Tells all stages to forget the open request, if there is one; waits for nobody."""
        request, self._open_request = self._open_request, None
        if request is not None:
            self._journal.close(request)
            if self.pipeline.is_running:
                self.pipeline.abort(request)

    def _await(self, kind: type[T], request: int, stage: int) -> list[T]:
        """Waits for messages of a kind about a request; `stage` is the one that owes them.

        A stage that is silent computes, and a prefill may take many minutes. One that says again
        and again that it has nothing to compute has lost the request.

        Raises:
            StageError: a stage failed, or the waiting is in vain.
        """
        deadline_s = time.monotonic() + self._stall_timeout_s
        num_reports, num_idle_waits = self.pipeline.num_idle_reports[stage], 0
        while True:
            arrived = self.pipeline.receive(min(WAIT_S, self._stall_timeout_s))
            wanted = [m for _, m in arrived if isinstance(m, kind) and m.request == request]
            for index, message in arrived:
                if isinstance(message, Stats) and message.request == request:
                    self._stats[index] = message.values
            if wanted:
                return wanted
            num_before, num_reports = num_reports, self.pipeline.num_idle_reports[stage]
            num_idle_waits = num_idle_waits + 1 if num_reports > num_before else 0
            if num_idle_waits > MAX_IDLE_WAITS:
                self._complain(stage, "has nothing to compute, but owes an answer")
            if time.monotonic() > deadline_s:
                self._complain(stage, f"did not answer for {self._stall_timeout_s:g} s")

    def _complain(self, stage: int, clause: str) -> NoReturn:
        name = self.hierarchy.models[stage].name
        raise StageError(f"stage {stage} ({name}) {clause}", self.pipeline.log_tail(stage))
