"""The one contract of all strategies: a prompt in, the target's text out, as it comes.

A strategy is an `Engine`: it turns a `Submit` into committed tokens. Everything that strategies
share (encoding, limits, stop texts, incremental text, timing) is here, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from pipespec.config import GenerationParams
from pipespec.decoding.hierarchy import Hierarchy
from pipespec.errors import DataError
from pipespec.messages import Submit
from pipespec.metrics import Origin, token_origins
from pipespec.state import cut_at_stop
from pipespec.tokenizer import StreamDecoder

Prompt = str | Sequence[int]
OnText = Callable[[str], None]
OnTokens = Callable[[Sequence[int], Sequence[Origin]], None]


class Batch(NamedTuple):
    """Committed tokens. finish_reason: "" until the last. verifications: which led to them, see
    `messages.Output`."""

    tokens: tuple[int, ...]
    finish_reason: str
    verifications: tuple[int, ...] = ()

    def origins(self) -> list[Origin]:
        """Of each token."""
        numbers = self.verifications
        return token_origins(len(self.tokens), zip(numbers[::3], numbers[1::3], numbers[2::3]))


class Engine(Protocol):
    """What a strategy implements."""

    hierarchy: Hierarchy

    def run(self, submit: Submit) -> Generator[Batch, None, None]:
        """Yields committed tokens in order; the last batch has a finish reason. Closing the
        generator early aborts the request."""
        ...

    def last_counts(self) -> list[dict[str, Any]]:
        """What each stage counted for the request that ended last, first draft first."""
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished request.

    text: without special tokens, cut before the first stop text. token_ids: exactly what the
    target committed, the end-of-text id or the token that completed the stop text included.
    arrivals: (seconds since the request, number of tokens) of each batch. counts: one map a stage,
    first draft first, as defined in `state.counts`.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    num_prompt_tokens: int
    total_time_s: float
    time_to_first_token_s: float
    arrivals: tuple[tuple[float, int], ...]
    counts: tuple[dict[str, Any], ...] = field(repr=False, default=())

    @property
    def ms_per_token(self) -> float:
        return 1000.0 * self.total_time_s / len(self.token_ids)


class Decoder(Protocol):
    """What users hold: a strategy with its models loaded. A context manager."""

    @property
    def strategy(self) -> str: ...

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams = ...,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """Writes a whole text. `on_tokens` gets tokens as they come and what brought each of them,
        then `on_text` the text that has become certain by them, if there is any."""
        ...

    def stream(self, prompt: Prompt, params: GenerationParams = ...) -> Iterator[str]:
        """Yields the text piece by piece."""
        ...

    def close(self) -> None:
        """Ends processes and frees memory. Idempotent."""
        ...


class Session:
    """The requests of one engine, in order; numbers them and turns tokens into text."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_requests = 0

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """See `Decoder.generate`.

        Raises:
            DataError: an empty prompt, or one longer than the target's context.
        """
        submit = self._submit(prompt, params)
        text = TextAssembler(self._engine.hierarchy, params.stop)
        token_ids: list[int] = []
        arrivals: list[tuple[float, int]] = []
        start_s = time.perf_counter()
        for batch in self._engine.run(submit):
            tokens, reason = batch.tokens, batch.finish_reason
            arrivals.append((time.perf_counter() - start_s, len(tokens)))
            token_ids += tokens
            if on_tokens is not None:
                on_tokens(tokens, batch.origins())
            piece = text.push(tokens, reason)
            if on_text is not None and piece:
                on_text(piece)
            finish_reason = reason
        return Generation(
            token_ids=tuple(token_ids),
            text=self.final_text(token_ids, params.stop),
            finish_reason=finish_reason,
            num_prompt_tokens=len(submit.prompt),
            total_time_s=arrivals[-1][0],
            time_to_first_token_s=arrivals[0][0],
            arrivals=tuple(arrivals),
            counts=tuple(self._engine.last_counts()),
        )

    def stream(self, prompt: Prompt, params: GenerationParams) -> Iterator[str]:
        """See `Decoder.stream`."""
        submit = self._submit(prompt, params)
        text = TextAssembler(self._engine.hierarchy, params.stop)
        batches = self._engine.run(submit)
        try:
            for batch in batches:
                if piece := text.push(batch.tokens, batch.finish_reason):
                    yield piece
        finally:
            batches.close()

    def final_text(self, token_ids: Sequence[int], stop: Sequence[str]) -> str:
        """The text of a whole output."""
        return cut_at_stop(self._engine.hierarchy.tokenizer.decode(token_ids), stop)

    def _submit(self, prompt: Prompt, params: GenerationParams) -> Submit:
        hierarchy = self._engine.hierarchy
        ids = hierarchy.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise DataError("the prompt is empty: there is no token to continue from")
        if not all(0 <= token < hierarchy.vocab_size for token in ids):
            raise DataError(f"the prompt has a token id outside 0..{hierarchy.vocab_size - 1}")
        # The last token drawn is never fed, so a full context still has room for one.
        room = hierarchy.context_length + 1 - len(ids)
        if room < 1:
            raise DataError(
                f"the prompt has {len(ids)} tokens, more than the {hierarchy.context_length} of "
                f"{hierarchy.models[-1].name}'s context: shorten it"
            )
        self._num_requests += 1
        return Submit(
            request=self._num_requests,
            prompt=tuple(ids),
            committed=(),
            sampling=params.sampling,
            max_new_tokens=min(params.max_new_tokens, room),
            eos=hierarchy.eos,
            stop=params.stop,
        )


class TextAssembler:
    """Tokens in, printable text out: no half characters, nothing that a stop text may swallow."""

    def __init__(self, hierarchy: Hierarchy, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(hierarchy.tokenizer)
        self._stop = stop
        self._longest = max((len(text) for text in stop), default=1)
        self._pending = ""

    def push(self, tokens: Sequence[int], finish_reason: str) -> str:
        """The text that is certain now."""
        self._pending += self._decoder.push(tokens)
        if finish_reason:
            return cut_at_stop(self._pending + self._decoder.flush(), self._stop)
        certain = len(self._pending) - (self._longest - 1)
        piece, self._pending = self._pending[: max(0, certain)], self._pending[max(0, certain) :]
        return piece
