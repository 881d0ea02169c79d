"""What a stage needs from a model: feed tokens at a position, get draws back.

A runner owns the KV cache and nothing else touches it. A *slot* is the cache of one request.
Rollback is a length: a row whose `start` lies before the end of what the slot holds makes the
runner forget everything from `start` on. Nothing is copied.

Runners do not know other stages, candidates, acceptance or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from pipespec.config import SamplingParams
from pipespec.state.tail import TailToken as TailToken

TAIL_ROWS: Final = 384  # of a slot beyond its context, for branches; a few MB with a large model


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
class TreeRow:
    """A row and, in the same forward, tokens of branches that leave its slot's text.

    row.ids may be empty. tail: in cache rows that follow each other, each after its parent, all
    behind the text. Rows of a branch that nothing follows any more may be used again, lower or
    higher than those of branches that live on. keep: cache rows to copy to `keep_start` and after
    before anything is fed; they are part of the text then. num_ranked: how many tokens to return
    for each draw, best first.
    """

    row: Row
    tail: Sequence[TailToken]
    keep: Sequence[int] = ()
    keep_start: int = 0
    num_ranked: int = 1


@dataclass(frozen=True, slots=True)
class BurstRow:
    """A tree, and forwards that follow it, each over what the one before ranked first: after the
    last own token of the row, which has one draw at most, and after each of the tail.

    rounds: in how many of them each of the tail goes on, in descending order, in cache rows that
    follow those of the forward before. num_more: the most of them. descriptors: of files; once one
    of these can be read no further forward begins.
    """

    tree: TreeRow
    rounds: Sequence[int]
    num_more: int
    descriptors: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """Facts about a loaded model. `vocab_size` is the number of ids that may be drawn (the
    tokenizer's), `context_length` the largest number of positions a slot can hold,
    `num_tail_rows` how many cache rows beyond them branches may use (0: `forward_tree` is not to
    be called), `has_bursts` whether it is a `BurstRunner`, `frees_processor` whether it is a
    `WaitingRunner`."""

    name: str
    runner: str
    device: str
    dtype: str
    vocab_size: int
    context_length: int
    num_parameters: int
    weight_bytes: int
    attention: str = ""
    num_tail_rows: int = 0
    has_bursts: bool = False
    frees_processor: bool = False


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


class WaitingRunner(ModelRunner, Protocol):
    """One whose forwards leave the processor free while a device computes, if its
    `info.frees_processor`."""

    def while_computing(self, do: Callable[[float], None]) -> None:
        """From now on forwards call `do(seconds)`, which is to take no longer than that."""
        ...


@runtime_checkable
class BranchingRunner(ModelRunner, Protocol):
    """One that can feed branches of a text beside it, if its `info.num_tail_rows` is not 0."""

    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        """One forward of a text and branches of it: the row's draws, then one after each of
        `row.tail`, `row.num_ranked` tokens each, best first."""
        ...


@runtime_checkable
class BurstRunner(BranchingRunner, Protocol):
    """One that can go on by itself, if its `info.has_bursts`."""

    def forward_burst(self, burst: BurstRow) -> list[list[tuple[int, ...]]]:
        """What each forward drew, as `forward_tree` returns it. Fewer follow than might if the
        runner would rather have them asked for one by one."""
        ...
