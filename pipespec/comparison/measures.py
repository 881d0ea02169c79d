"""From turns to the rows of a table. Pure.

A *ratio* is that of tokens/s of two turns of one round, which saw the same machine in the same
minutes; of several rounds the median is taken, of ratios and not of their parts. The *spread* is
the smallest and the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from pipespec.comparison.contestants import GREEDY
from pipespec.comparison.drafting import DraftRates, draft_rates
from pipespec.comparison.record import Entrant, PromptResult, Record, Turn

OWN: Final = "own"


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one number, over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where an output first differs from greedy's. unit: "token", or "char" where a contestant
    shows its text only. Positions count from 0."""

    index: int
    position: int
    unit: str
    output: str
    expected: str


@dataclass(frozen=True, slots=True)
class Sameness:
    """num_compared prompts, of which num_equal had greedy's text in every round. first: of those
    that differ, the one that does earliest."""

    num_compared: int
    num_equal: int
    first: Divergence | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant in one table. variant: its best one, by the median; others: the medians of all
    its variants. ratio: to greedy of the same table; None without one. sameness: None where texts
    cannot be compared. drafts: of its best variant; None where nobody drafted, or tells of it."""

    entrant: Entrant
    variant: str
    tokens_per_s: Spread
    ratio: Spread | None
    sameness: Sameness | None
    others: Mapping[str, float]
    drafts: DraftRates | None


def spread(values: Iterable[float]) -> Spread | None:
    """None of no values."""
    found = list(values)
    return Spread(median(found), min(found), max(found)) if found else None


def ratios(turns: Iterable[Turn], greedy: Iterable[Turn]) -> list[float]:
    """Of tokens/s, for each round in which both had their turn."""
    reference = {turn.round: turn.tokens_per_s for turn in greedy}
    return [turn.tokens_per_s / reference[turn.round] for turn in turns if turn.round in reference]


def table_rows(record: Record, table: str) -> list[Row]:
    """The rows of a table, in the order of the entrants; those without a turn have none."""
    entrants = [entrant for entrant in record.entrants if table in entrant.tables]
    greedy = [turn for x in entrants if x.name == GREEDY for turn in _turns(record, x.key)]
    rows = (_row(record, entrant, greedy) for entrant in entrants)
    return [row for row in rows if row is not None]


def _row(record: Record, entrant: Entrant, greedy: Sequence[Turn]) -> Row | None:
    turns = _turns(record, entrant.key)
    by_variant = {
        label: [turn for turn in turns if turn.variant == label] for label in entrant.variants
    }
    speeds = {
        label: found
        for label, group in by_variant.items()
        if (found := spread(turn.tokens_per_s for turn in group)) is not None
    }
    if not speeds:
        return None
    best = max(speeds, key=lambda label: speeds[label].median)
    # Drawn with noise of another kind, a text cannot be greedy's.
    is_sampled = bool(record.metadata["sampling"]["temperature"])
    comparable = greedy and (entrant.kind == OWN or not is_sampled)
    return Row(
        entrant,
        best,
        speeds[best],
        spread(ratios(by_variant[best], greedy)),
        # All variants must write greedy's text, not only the fastest.
        sameness(turns, greedy, record.outputs) if comparable else None,
        {label: speed.median for label, speed in speeds.items()},
        draft_rates(p.stages for turn in by_variant[best] for p in turn.prompts),
    )


def sameness(
    turns: Sequence[Turn], greedy: Sequence[Turn], outputs: Mapping[str, Mapping[str, Any]]
) -> Sameness | None:
    """Compares with what greedy wrote in its first turn; None where there is nothing to compare."""
    expected = {p.index: p.output for p in greedy[0].prompts if p.output is not None}
    differing: dict[int, Divergence] = {}
    compared: set[int] = set()
    for prompt in (prompt for turn in turns for prompt in turn.prompts):
        if prompt.index not in expected or prompt.output is None:
            continue
        compared.add(prompt.index)
        found = _divergence(prompt, expected[prompt.index], outputs)
        if found is not None:
            differing.setdefault(prompt.index, found)
    if not compared:
        return None
    first = min(differing.values(), key=lambda d: (d.position, d.index), default=None)
    return Sameness(len(compared), len(compared) - len(differing), first)


def _divergence(
    prompt: PromptResult, expected_key: str, outputs: Mapping[str, Mapping[str, Any]]
) -> Divergence | None:
    assert prompt.output is not None
    if prompt.output == expected_key:
        return None
    found, expected = outputs[prompt.output], outputs[expected_key]
    kind = "token_ids" if "token_ids" in found and "token_ids" in expected else "text"
    one, other = found.get(kind), expected.get(kind)
    if one is None or other is None or one == other:
        return None
    shorter = min(len(one), len(other))
    position = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    unit = "token" if kind == "token_ids" else "char"
    return Divergence(prompt.index, position, unit, prompt.output, expected_key)


def _turns(record: Record, key: str) -> list[Turn]:
    return [turn for turn in record.turns if turn.contestant == key]
