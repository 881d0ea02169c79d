"""A runner without weights: the latencies of hardware that is not at hand, with oracle tokens.

It sleeps as long as a table says a forward takes and draws tokens from seeded hashes, so that the
processes, transport and policies of PipeSpec are measured at, say, the latencies of an A100.
The target's token is a function of (seed, *prefix*): a wrong token derails what follows, as with a
real model. A draft agrees where a uniform number, a function of (seed, prefix) too, lies below its
`agreement`; so where a worse draft is right a better one is right as well.

A models config's "emulated" object:

    step_ms               forward time by number of tokens, {"1": 120, "8": 431}; linear between,
                          flat beyond the ends
    prefill_ms_per_token  added for each token beyond the table's largest number; default 0
    agreement             drafts only: how often the token equals the target's on the same prefix
    vocab_size            default: the tokenizer's; equal in all stages
    context_length        default 131072
    seed                  default 0; equal in all stages
    eos_after             the token at this position (the prompt counts) ends the text; default none
    eos_token_id          default 0; drawn nowhere else

Sampling parameters change nothing here. No torch.
"""

from __future__ import annotations

import math
import re
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from pipespec.errors import ConfigError
from pipespec.hashing import ROOT, extend, hash_tokens
from pipespec.runners.base import Row, RunnerInfo
from pipespec.runners.rows import check_row

_NUM_IDS: Final = 1 << 31  # a prompt may hold any id, whatever ids are drawn
_MAX_OVERSLEEP_S: Final = 1e-3
_TARGET_STREAM: Final = 1
_AGREE_STREAM: Final = 2
_WRONG_STREAM: Final = 3


@dataclass(frozen=True, slots=True)
class Emulation:
    """The "emulated" object, checked; step_ms sorted by number of tokens."""

    step_ms: tuple[tuple[int, float], ...]
    prefill_ms_per_token: float = 0.0
    agreement: float | None = None
    vocab_size: int = _NUM_IDS
    context_length: int = 1 << 17
    seed: int = 0
    eos_after: int | None = None
    eos_token_id: int = 0

    def forward_s(self, num_tokens: int) -> float:
        """Seconds that one forward of so many tokens takes."""
        counts = [count for count, _ in self.step_ms]
        at = bisect_left(counts, num_tokens)
        if at == len(counts):
            beyond = num_tokens - counts[-1]
            return (self.step_ms[-1][1] + beyond * self.prefill_ms_per_token) / 1e3
        count, step_ms = self.step_ms[at]
        if at > 0:
            count_before, ms_before = self.step_ms[at - 1]
            share = (num_tokens - count_before) / (count - count_before)
            step_ms = ms_before + share * (step_ms - ms_before)
        return step_ms / 1e3


def parse_emulation(values: Mapping[str, Any], name: str) -> Emulation:
    """Checks a models config's "emulated" object; `name` is the model's, for messages.

    Raises:
        ConfigError: naming the model, the key and what is allowed.
    """
    known = [item.name for item in fields(Emulation)]
    for key in values:
        if key not in known:
            raise ConfigError(f'{name}: unknown key "{key}" in "emulated"; it has {known}')
    checked: dict[str, Any] = {"step_ms": _step_ms(values.get("step_ms"), name)}
    for key, whole, low, high in (
        ("prefill_ms_per_token", False, 0, 1e6),
        ("agreement", False, 0, 1),
        ("vocab_size", True, 3, _NUM_IDS),
        ("context_length", True, 1, 1 << 40),
        ("seed", True, 0, (1 << 63) - 1),
        ("eos_after", True, 1, 1 << 40),
        ("eos_token_id", True, 0, _NUM_IDS - 1),
    ):
        value = values.get(key)
        if value is None:
            continue
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            kind = "an integer" if whole else "a number"
            raise ConfigError(
                f'{name}: "emulated" has "{key}": {value!r}; it must be {kind} from {low} to {high}'
            )
        checked[key] = value
    return Emulation(**checked)


def _step_ms(table: object, name: str) -> tuple[tuple[int, float], ...]:
    problem = f'{name}: "emulated" needs "step_ms", an object like {{"1": 120, "8": 431}}'
    if not isinstance(table, Mapping) or not table:
        raise ConfigError(problem)
    entries = []
    for key, value in table.items():
        text = str(key)
        if not re.fullmatch("[1-9][0-9]{0,8}", text):
            raise ConfigError(f"{problem}; {key!r} is not a number of tokens")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{problem}; {value!r} is not a number of milliseconds")
        if not 0 <= value <= 1e7 or not math.isfinite(value):
            raise ConfigError(f"{problem}; {value!r} is out of range")
        entries.append((int(text), float(value)))
    return tuple(sorted(entries))


class Oracle:
    """Tokens as functions of the hash of the prefix they follow; `stage` tells drafts apart."""

    def __init__(self, emulation: Emulation, vocab_size: int, stage: str) -> None:
        assert vocab_size >= 3
        self._emulation = emulation
        self._num_ordinary = vocab_size - 1  # all but the one that ends the text
        seed = hash_tokens((emulation.seed,))
        self._target_key = extend(seed, _TARGET_STREAM)
        self._agree_key = extend(seed, _AGREE_STREAM)
        self._wrong_key = hash_tokens(stage.encode(), extend(seed, _WRONG_STREAM))

    def target(self, prefix_hash: int, position: int) -> int:
        """The target's token at `position`, after the prefix with this hash."""
        if position == self._emulation.eos_after:
            return self._emulation.eos_token_id
        return self._ordinary(extend(self._target_key, prefix_hash) % self._num_ordinary)

    def stage(self, prefix_hash: int, position: int) -> int:
        """This stage's token: the target's, or any other."""
        token = self.target(prefix_hash, position)
        agreement = self._emulation.agreement
        uniform = extend(self._agree_key, prefix_hash) * 2.0**-64
        if agreement is None or uniform < agreement:
            return token
        other = extend(self._wrong_key, prefix_hash)
        end = self._emulation.eos_token_id
        if token == end:
            return self._ordinary(other % self._num_ordinary)
        rank = token - (token > end)
        return self._ordinary((rank + 1 + other % (self._num_ordinary - 1)) % self._num_ordinary)

    def _ordinary(self, rank: int) -> int:
        """The rank-th id other than the one that ends the text."""
        return rank + (rank >= self._emulation.eos_token_id)


class EmulatedRunner:
    """Imitates a model as its config's "emulated" object says.

    name: the stage's identity among drafts. vocab_size: how many ids the tokenizer knows.

    Raises:
        ConfigError: an "emulated" object that is wrong.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        name: str,
        vocab_size: int,
        context_length: int | None = None,
    ) -> None:
        self._emulation = parse_emulation(values, name)
        vocab_size = min(vocab_size, self._emulation.vocab_size)
        if vocab_size < 3 or self._emulation.eos_token_id >= vocab_size:
            raise ConfigError(
                f'{name}: "emulated" needs at least 3 token ids and "eos_token_id" among them, '
                f"not {self._emulation.eos_token_id} of {vocab_size}"
            )
        limit = self._emulation.context_length
        self._oracle = Oracle(self._emulation, vocab_size, name)
        self._hashes: dict[int, list[int]] = {}  # slot -> hash of each prefix it holds, [0]: empty
        self._oversleep_s = 0.0
        self._info = RunnerInfo(
            name=name,
            runner="emulated",
            device="emulated",
            dtype="none",
            vocab_size=vocab_size,
            context_length=min(context_length or limit, limit),
            num_parameters=0,
            weight_bytes=0,
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """Draws for every row, after the time that the table gives for all their tokens together.

        Raises:
            PipeSpecError: a position beyond the context; nothing was changed.
        """
        deadline_s = time.perf_counter()
        deadline_s += self._emulation.forward_s(sum(len(row.ids) for row in rows))
        for row in rows:
            check_row(row, self._info, _NUM_IDS)
        results = [self._draws(row) for row in rows]
        self._sleep_until(deadline_s)
        return results

    def release(self, slot: int) -> None:
        self._hashes.pop(slot, None)

    def close(self) -> None:
        self._hashes.clear()

    def _draws(self, row: Row) -> list[int]:
        hashes = self._hashes.setdefault(row.slot, [ROOT])
        assert row.start < len(hashes), "a gap between what the slot holds and the row"
        del hashes[row.start + 1 :]
        prefix_hash = hashes[-1]
        for token in row.ids:
            prefix_hash = extend(prefix_hash, token)
            hashes.append(prefix_hash)
        first = len(hashes) - row.num_draws
        return [self._oracle.stage(hashes[n], n) for n in range(first, len(hashes))]

    def _sleep_until(self, deadline_s: float) -> None:
        """Sleeps, aiming early by what sleeps have lately been late: exact on average, and the core
        is free meanwhile."""
        sleep_s = deadline_s - time.perf_counter() - self._oversleep_s
        if sleep_s <= 0.0:
            return
        time.sleep(sleep_s)
        late_s = time.perf_counter() - deadline_s
        learned_s = self._oversleep_s + late_s / 8
        self._oversleep_s = min(max(learned_s, 0.0), _MAX_OVERSLEEP_S)
