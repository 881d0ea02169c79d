"""How well drafts did, from what our stages counted: block efficiency, hit rate, wasted drafts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

from pipespec.metrics import StageCounts
from pipespec.metrics.definitions import block_efficiency, outcome_hit_rate, token_wastage


@dataclass(frozen=True, slots=True)
class StageSums:
    """What one stage counted, as sums over steps; the names are those of `StageCounts`."""

    num_verifications: int
    num_emitted: int
    num_drafted: int
    num_rolled_back: int
    num_past_end: int
    num_corrections: int
    num_outcome_hits: int

    @classmethod
    def of(cls, counts: StageCounts) -> Self:
        """Of one text."""
        return cls(*(getattr(counts, item.name) for item in fields(cls)))

    @classmethod
    def total(cls, texts: Iterable[StageSums]) -> Self:
        """Of several texts."""
        found = list(texts)
        return cls(*(sum(getattr(text, item.name) for text in found) for item in fields(cls)))


@dataclass(frozen=True, slots=True)
class DraftRates:
    """As `metrics.definitions` has them: of the target, and of each draft, the smallest first. None
    where nothing was counted."""

    block_efficiency: float | None
    hit_rates: tuple[float | None, ...]
    wastages: tuple[float | None, ...]


def draft_rates(texts: Iterable[Sequence[StageSums]]) -> DraftRates | None:
    """texts: the stages of each, target last. None without texts or without drafts."""
    stages = [StageSums.total(stage) for stage in zip(*texts, strict=True)]
    if len(stages) < 2:
        return None
    *drafts, target = stages
    return DraftRates(
        block_efficiency(target.num_emitted, target.num_verifications),
        tuple(outcome_hit_rate(d.num_outcome_hits, d.num_corrections) for d in drafts),
        tuple(token_wastage(d.num_rolled_back, d.num_past_end, d.num_drafted) for d in drafts),
    )
