"""How unevenly tokens are accepted: the verifications of a pair of models, sorted by the tokens
that they brought, in five equal parts, and the mean of each part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from pipespec.errors import NothingLeftError
from pipespec.metrics import SampleTotals, sample_totals
from pipespec.metrics.definitions import part_means
from pipespec.results import RunExtract
from pipespec.statistics.comparison import (
    DRAFTS,
    LOOKAHEAD,
    STRATEGY,
    left_out_notes,
    run_columns,
    run_row,
)
from pipespec.statistics.groups import Compared, Group, best_lookaheads
from pipespec.statistics.tables import Column, Row, Table

NUM_PARTS: Final = 5
_BOUNDS: Final = [100 * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
_PARTS: Final = tuple(
    Column(f"tokens_per_verification_{low}_to_{high}_percent", f"{low}-{high}%", digits=2)
    for low, high in pairwise(_BOUNDS)
)
_COLUMNS: Final = (
    STRATEGY,
    DRAFTS,
    LOOKAHEAD,
    Column("num_verifications", "verifications", rank=1),
    *_PARTS,
    Column("file", is_text=True),
)
_NOTE: Final = (
    "tokens per verification, the bonus or correction token included: mean of each fifth of the "
    "verifications, sorted by it"
)


@dataclass(frozen=True, slots=True)
class AcceptedSample:
    """What is kept of a sample. emitted: of each pair, how many verifications brought how many
    tokens, the bonus or correction token included."""

    totals: SampleTotals
    emitted: tuple[Counter[int], ...]


def accepted_sample(result: Mapping[str, Any]) -> AcceptedSample:
    """Of an item of `results`. Steps that a verdict overtook brought nothing and do not count.

    Raises:
        KeyError, TypeError, ValueError: its metrics are not those of a result file.
    """
    lists = result["metrics"].get("accepted_tokens", ())
    emitted = tuple(Counter(count for count in counts if count > 0) for counts in lists)
    return AcceptedSample(sample_totals(result), emitted)


def accepted_tables(
    groups: Iterable[Group], runs: Iterable[RunExtract[AcceptedSample]], *, show_all: bool
) -> list[Table]:
    """A table for each group that has a draft. groups: of the totals of `runs`.

    Raises:
        NothingLeftError: there is none.
    """
    by_path = {run.path: run.samples for run in runs}
    tables = []
    for group in groups:
        shown = group.runs if show_all else best_lookaheads(group.runs)
        with_drafts = [item for item in shown if item.run.metadata["strategy"] != "greedy"]
        if with_drafts:
            rows = tuple(_row(item, by_path[item.run.path]) for item in with_drafts)
            columns = run_columns(group, _COLUMNS)
            notes = (*left_out_notes(group, shown), _NOTE)
            names = group.short_names
            tables.append(Table(group.title, columns, rows, group.about, notes, names))
    if not tables:
        raise NothingLeftError("no file is of a run with drafts; greedy accepts nothing")
    return tables


def _row(item: Compared, samples: Sequence[AcceptedSample]) -> Row:
    pairs = _sums(samples)
    means = [part_means(counts, NUM_PARTS) for counts in pairs]
    return {
        **run_row(item),
        "num_verifications": tuple(counts.total() for counts in pairs),
        **{
            column.name: tuple(parts[number] for parts in means)
            for number, column in enumerate(_PARTS)
        },
    }


def _sums(samples: Sequence[AcceptedSample]) -> list[Counter[int]]:
    """Of each pair, over all samples."""
    sums: list[Counter[int]] = []
    for sample in samples:
        for pair, counts in enumerate(sample.emitted):
            if pair == len(sums):
                sums.append(Counter())
            sums[pair].update(counts)
    return sums
