"""Whether a runner's bits depend on the text alone: the test that `--deterministic` starts with.

Libraries promise little here, so it is tried on the loaded model: the logits after a token must be
the same bits whatever row of a step the token has, whatever is fed beside it, and whatever the
cache holds beyond the text. Knows no kernel; asks for logits like anyone else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipespec.config import SamplingParams
from pipespec.errors import ModelLoadError
from pipespec.runners.base import Row, RunnerInfo

_NUM_TOKENS: Final = 20  # more than two steps of `graphs.FIXED_ROWS`
_SIZES: Final = (2, 3, 5, 8, 13)  # of the pieces that the tokens are fed in
_CONTEXTS: Final = (3, 700)  # tokens before them; the second lies beyond one chunk of a prompt
_GREEDY: Final = SamplingParams()


@runtime_checkable
class LogitRunner(Protocol):
    """What the test needs."""

    @property
    def info(self) -> RunnerInfo: ...

    def logits(self, row: Row) -> Tensor: ...

    def release(self, slot: int) -> None: ...


def check_deterministic(runner: LogitRunner) -> None:
    """Tries it after a short and after a long text.

    Raises:
        ModelLoadError: in one line, what the bits depend on.
    """
    what = first_dependence(runner)
    if what:
        info = runner.info
        raise ModelLoadError(
            f"--deterministic: on this machine the bits of {info.name} ({info.runner}, "
            f'{info.dtype}, {info.device}) depend on {what}; try "threads": 1 or another dtype in '
            "the models config, or leave the flag out"
        )


def first_dependence(runner: LogitRunner) -> str:
    """The first of the things that must not matter and does; empty if there is none."""
    length = runner.info.context_length
    count = min(_NUM_TOKENS, length // 2)
    for num_before in sorted({min(n, length - count) for n in _CONTEXTS}):
        found = _dependence_after(runner, num_before, count)
        runner.release(0)
        if found:
            return found
    return ""


def _dependence_after(runner: LogitRunner, num_before: int, count: int) -> str:
    choice, num_ids = random.Random(num_before), runner.info.vocab_size
    before = choice.choices(range(num_ids), k=num_before)
    text = choice.choices(range(num_ids), k=count)

    def feed(start: int, ids: Sequence[int]) -> Tensor:
        return runner.logits(Row(0, num_before + start, ids, len(ids), _GREEDY))

    # A first token is fed with its prompt; what is compared are steps, so that it begins them all.
    runner.logits(Row(0, 0, [*before, *text[:1]], 1, _GREEDY))
    alone = torch.cat([feed(at, text[at : at + 1]) for at in range(count)])
    for size in (size for size in _SIZES if size <= count):
        pieces = [feed(at, text[at : at + size]) for at in range(0, count, size)]
        if not torch.equal(torch.cat(pieces), alone):
            return "the row of its step in which a token is fed"
    for at in range(count - 1):
        others = choice.choices(range(num_ids), k=count - at - 1)
        if not torch.equal(feed(at, [text[at], *others])[:1], alone[at : at + 1]):
            return "the tokens that are fed after it in its step"
        feed(at, text[at : at + 1])
    again = torch.cat([feed(at, text[at : at + 1]) for at in range(count)])
    return "" if torch.equal(again, alone) else "what the cache holds beyond the text"
