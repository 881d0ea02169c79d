"""Asynchronous speculative decoding: every model its own process, nobody waits for a round trip.

This is the caller's side: it starts the processes, submits, and yields what the target commits.
The stages talk among themselves (`stage`, `state`). Source: PipeSpec, arXiv 2505.01572.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Self

from pipespec.config import GenerationParams, Schedule
from pipespec.decoding.base import Batch, Generation, Prompt, Session
from pipespec.decoding.greedy import DEFAULTS
from pipespec.decoding.hierarchy import Hierarchy
from pipespec.errors import StageError, UsageError
from pipespec.launcher import OnProgress, Pipeline
from pipespec.messages import Output, Stats, Submit
from pipespec.state import Journal

STALL_S = 300.0  # without any token for so long, something is stuck
STATS_S = 10.0  # for the stages to report on a finished request


class AsyncChainSpeculativeDecoder:
    """Starts one process a model and keeps them until `close`."""

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
        self._session = Session(self)
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
        )
        self.pipeline.start()

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams = DEFAULTS,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        return self._session.generate(prompt, params, on_text)

    def stream(self, prompt: Prompt, params: GenerationParams = DEFAULTS) -> Iterator[str]:
        return self._session.stream(prompt, params)

    def close(self) -> None:
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, submit: Submit) -> Generator[Batch, None, None]:
        request, self._stats = submit.request, {}
        self._journal.open(request, len(submit.prompt))
        self.pipeline.submit(submit)
        is_complete = False
        try:
            for tokens, reason in self._outputs(request):
                is_complete = bool(reason)
                if is_complete:
                    self.pipeline.finish(request)
                yield tokens, reason
            self._collect_stats(request)
        finally:
            if not is_complete and self.pipeline.is_running:
                self.pipeline.abort(request)
                self._collect_stats(request)
            self._journal.close(request)

    def last_counts(self) -> list[dict[str, Any]]:
        return [self._stats.get(index, {}) for index in range(len(self.hierarchy.models))]

    def _outputs(self, request: int) -> Iterator[Batch]:
        deadline_s = time.monotonic() + self._stall_timeout_s
        while True:
            for _, message in self.pipeline.receive(timeout_s=1.0):
                if not isinstance(message, Output) or message.request != request:
                    continue
                deadline_s = time.monotonic() + self._stall_timeout_s
                new = self._journal.on_output(message, self._journal.incarnation)
                if new:
                    yield new, message.finish_reason
                if message.finish_reason:
                    return
            if time.monotonic() > deadline_s:
                name = self.hierarchy.models[-1].name
                raise StageError(
                    f"the target {name} wrote no token for {self._stall_timeout_s:.0f} s",
                    self.pipeline.log_tail(len(self.hierarchy.models) - 1),
                )

    def _collect_stats(self, request: int) -> None:
        """Every stage reports once it has forgotten the request; then the next may start."""
        deadline_s = time.monotonic() + STATS_S
        while len(self._stats) < len(self.hierarchy.models) and time.monotonic() < deadline_s:
            for index, message in self.pipeline.receive(timeout_s=0.5):
                if isinstance(message, Stats) and message.request == request:
                    self._stats[index] = message.values
