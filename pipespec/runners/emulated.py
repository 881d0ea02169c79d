"""A runner without weights: the latencies of hardware that is not at hand, with oracle tokens.

It sleeps as long as a table says a forward takes and draws tokens from seeded hashes, so that the
processes, transport and policies of PipeSpec are measured at, say, the latencies of an A100.
What a config may say and which tokens follow from it is defined in `pipespec.emulation`.
Sampling parameters change nothing here. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pipespec.emulation.model import NUM_IDS, NUM_TAIL_ROWS, parse_emulation
from pipespec.errors import ConfigError
from pipespec.hashing import ROOT, extend
from pipespec.runners.base import Row, RunnerInfo, TreeRow
from pipespec.runners.rows import check_row, check_tree

_MAX_OVERSLEEP_S: Final = 1e-3


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
        self._oracle = self._emulation.oracle(vocab_size, name)
        self._hashes: dict[int, list[int]] = {}  # slot -> hash of each prefix it holds, [0]: empty
        self._tails: dict[int, dict[int, int]] = {}  # slot -> row beyond them -> prefix it ends
        self._oversleep_s = 0.0
        self._do: Callable[[float], None] = time.sleep
        self._info = RunnerInfo(
            name=name,
            runner="emulated",
            device="emulated",
            dtype="none",
            vocab_size=vocab_size,
            context_length=min(context_length or limit, limit),
            num_parameters=0,
            weight_bytes=0,
            num_tail_rows=NUM_TAIL_ROWS,
            frees_processor=True,
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
            check_row(row, self._info, NUM_IDS)
        results = [self._draws(row) for row in rows]
        self._sleep_until(deadline_s)
        return results

    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        """See `BranchingRunner`; every token fed counts for the time.

        Raises:
            PipeSpecError: a position beyond the context; nothing was changed.
        """
        deadline_s = time.perf_counter()
        deadline_s += self._emulation.forward_s(len(row.row.ids) + len(row.tail))
        check_tree(row, self._info, NUM_IDS)
        hashes = self._hashes.setdefault(row.row.slot, [ROOT])
        tail = self._tails.setdefault(row.row.slot, {})
        if row.keep:
            assert row.keep_start < len(hashes), "a gap between what the slot holds and is kept"
            hashes[row.keep_start + 1 :] = [tail[kept] for kept in row.keep]
        ends = self._feed(hashes, row.row)
        for item in row.tail:
            is_text = item.parent_row + 1 < len(hashes)
            before = hashes[item.parent_row + 1] if is_text else tail[item.parent_row]
            tail[item.row] = extend(before, item.token)
            ends.append((tail[item.row], item.position + 1))
        draws = [tuple(self._oracle.ranked(end, row.num_ranked, n)) for end, n in ends]
        self._sleep_until(deadline_s)
        return draws

    def while_computing(self, do: Callable[[float], None]) -> None:
        """See `WaitingRunner`."""
        self._do = do

    def release(self, slot: int) -> None:
        self._hashes.pop(slot, None)
        self._tails.pop(slot, None)

    def close(self) -> None:
        self._hashes.clear()
        self._tails.clear()

    def _draws(self, row: Row) -> list[int]:
        hashes = self._hashes.setdefault(row.slot, [ROOT])
        return [self._oracle.draw(end, n) for end, n in self._feed(hashes, row)]

    def _feed(self, hashes: list[int], row: Row) -> list[tuple[int, int]]:
        """The hashes of the prefixes after which the row draws, and their lengths."""
        assert row.start < len(hashes), "a gap between what the slot holds and the row"
        del hashes[row.start + 1 :]
        prefix_hash = hashes[-1]
        for token in row.ids:
            prefix_hash = extend(prefix_hash, token)
            hashes.append(prefix_hash)
        first = len(hashes) - row.num_draws
        return [(hashes[n], n) for n in range(first, len(hashes))]

    def _sleep_until(self, deadline_s: float) -> None:
        """Sleeps, aiming early by what sleeps have lately been late: exact on average, and the core
        is free meanwhile. By half of the time at most: who does not sleep learns nothing new."""
        sleep_s = deadline_s - time.perf_counter()
        if sleep_s <= 0.0:
            return
        self._do(max(sleep_s - self._oversleep_s, sleep_s / 2))
        late_s = time.perf_counter() - deadline_s
        learned_s = self._oversleep_s + late_s / 8
        self._oversleep_s = min(max(learned_s, 0.0), _MAX_OVERSLEEP_S)
