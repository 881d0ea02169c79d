"""What a stage needs from a model: feed tokens at a position, get draws back.

A runner owns the KV cache and nothing else touches it. A *slot* is the cache of one request.
Rollback is a length: a row whose `start` lies before the end of what the slot holds makes the
runner forget everything from `start` on. Nothing is copied.

Runners do not know other stages, candidates, acceptance or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pipespec.config import SamplingParams


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens to feed into one slot.

    `ids[j]` stands at absolute position `start + j`; `start` is at most the slot's cached length.
    The runner returns draws after the last `num_draws` of `ids` (1 <= num_draws <= len(ids)): the
    draw after the token at position n is the stage's choice for position n + 1.
    """

    slot: int
    start: int
    ids: Sequence[int]
    num_draws: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """Facts about a loaded model. `vocab_size` is the number of ids that may be drawn (the
    tokenizer's), `context_length` the largest number of positions a slot can hold."""

    name: str
    runner: str
    device: str
    dtype: str
    vocab_size: int
    context_length: int
    num_parameters: int
    weight_bytes: int
    attention: str = ""


@runtime_checkable
class ModelRunner(Protocol):
    """A loaded model."""

    @property
    def info(self) -> RunnerInfo: ...

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """One forward for every row; `result[r]` holds `rows[r].num_draws` token ids, in order."""
        ...

    def release(self, slot: int) -> None:
        """Forget what the slot holds; its memory may be used for another request."""
        ...

    def close(self) -> None:
        """Give back device memory. Idempotent."""
        ...
