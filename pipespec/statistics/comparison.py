"""The table of all runs: time per token, both speed-ups, acceptance, energy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from pipespec.metrics import definitions, energy_estimate_j
from pipespec.results.labels import lookahead_text, model_names
from pipespec.statistics.groups import Compared, Group, best_lookaheads, devices_of
from pipespec.statistics.tables import NOTHING, Column, Row, Table, Value

RECORDED: Final = "recorded"
POWER_SAMPLES: Final = "power samples"
ESTIMATED: Final = "~"


def _energy(row: Row) -> str:
    value = row["energy_per_token_j"]
    if not isinstance(value, float):
        return NOTHING
    return f"{ESTIMATED if row['energy_source'] == POWER_SAMPLES else ''}{value:,.2f}"


def _same_text(row: Row) -> str:
    matched = row["num_matched_samples"]
    return f"{row['num_same_text']}/{matched}" if matched else NOTHING


STRATEGY: Final = Column("strategy", "strategy", is_text=True)
FOLDER: Final = Column("folder", is_text=True)
SHOWN_FOLDER: Final = Column("folder", "folder", is_text=True)
DRAFTS: Final = Column("drafts", "drafts", is_text=True)
LOOKAHEAD: Final = Column("lookahead", "lookahead")
_COLUMNS: Final = (
    STRATEGY,
    DRAFTS,
    LOOKAHEAD,
    Column("num_samples", "samples", rank=6),
    Column("num_tokens"),
    Column("total_time_s"),
    Column("ms_per_token", "ms/token", digits=2),
    Column("tokens_per_s", "tokens/s", digits=1, rank=7),
    Column("speed_up_same_prompts", "speed-up (same prompts)", digits=2, unit="x"),
    Column("speed_up_all_samples", "speed-up (published way)", digits=2, unit="x", rank=1),
    Column("num_matched_samples"),
    Column("num_same_text", "same text", rank=8, show=_same_text),
    Column("acceptance_rate", "acceptance rate", digits=3, rank=3),
    Column("block_efficiency", "block efficiency", digits=2, rank=4),
    Column("energy_per_token_j", "J/token", rank=2, show=_energy),
    Column("energy_source"),
    Column("file", is_text=True),
)


def comparison_tables(groups: Iterable[Group], *, show_all: bool) -> list[Table]:
    """A table for each group. show_all: every lookahead, not only the best of each hierarchy."""
    return [_table(group, show_all) for group in groups]


def energy_per_token(item: Compared) -> tuple[float | None, str | None]:
    """Joules, and where they come from: what the run's own monitor says (it reads the devices'
    counters where they have one), else an estimate from the power that it sampled."""
    if item.summary.energy_per_token_j is not None:
        return item.summary.energy_per_token_j, RECORDED
    energy_j = energy_estimate_j(item.run.samples, devices_of(item.run.metadata))
    if energy_j is None:
        return None, None
    return definitions.energy_per_token(energy_j, item.summary.num_tokens), POWER_SAMPLES


def run_row(item: Compared) -> dict[str, Value]:
    """What names a run within its group."""
    metadata, path = item.run.metadata, item.run.path
    text = lookahead_text(metadata)
    return {
        "strategy": metadata["strategy"],
        "folder": str(path.parent),
        "drafts": model_names(metadata)[:-1],
        "lookahead": None if text == NOTHING else int(text) if text != "auto" else text,
        "file": str(path),
    }


def run_columns(group: Group, columns: Sequence[Column]) -> tuple[Column, ...]:
    """The columns; people see the folder where runs come from several."""
    return (SHOWN_FOLDER if len(group.folders) > 1 else FOLDER, *columns)


def left_out_notes(group: Group, shown: Sequence[Compared]) -> list[str]:
    """That not all runs are in the table."""
    num_left_out = len(group.runs) - len(shown)
    if not num_left_out:
        return []
    runs = "1 run" if num_left_out == 1 else f"{num_left_out} runs"
    return [f"fastest lookahead of each hierarchy; {runs} with others left out (--all shows them)"]


def _table(group: Group, show_all: bool) -> Table:
    shown = group.runs if show_all else best_lookaheads(group.runs)
    rows = tuple(_row(item) for item in shown)
    notes = [*left_out_notes(group, shown), *_baseline_notes(group, shown)]
    notes += [*_acceptance_notes(rows), *_energy_notes(rows)]
    columns, names = run_columns(group, _COLUMNS), group.short_names
    return Table(group.title, columns, rows, group.about, tuple(notes), names)


def _row(item: Compared) -> Row:
    summary, compared = item.summary, item.comparison
    energy_j, source = energy_per_token(item)
    return {
        **run_row(item),
        "num_samples": summary.num_samples,
        "num_tokens": summary.num_tokens,
        "total_time_s": summary.total_time_s,
        "ms_per_token": summary.ms_per_token,
        "tokens_per_s": summary.tokens_per_s,
        "speed_up_same_prompts": compared.speed_up if compared else None,
        "speed_up_all_samples": _published_way(item),
        "num_matched_samples": compared.num_matched if compared else None,
        "num_same_text": compared.num_same_text if compared else None,
        "acceptance_rate": summary.acceptance_rate,
        "block_efficiency": summary.block_efficiency,
        "energy_per_token_j": energy_j,
        "energy_source": source,
    }


def _published_way(item: Compared) -> float | None:
    """The quotient of the means over all samples of each file, on the same prompts or not."""
    baseline_s = item.baseline.time_per_token_s if item.baseline else None
    if baseline_s is None or item.summary.time_per_token_s is None:
        return None
    return definitions.speed_up_ratio(baseline_s, item.summary.time_per_token_s)


def _baseline_notes(group: Group, shown: Sequence[Compared]) -> list[str]:
    if all(item.comparison is None for item in shown):
        return [
            f"no speed-up: a greedy run of {group.target} on {group.dataset} is missing "
            "(python -m pipespec.benchmark --strategy greedy)"
        ]
    matched = {
        (item.comparison.num_matched, item.summary.num_samples) for item in shown if item.comparison
    }
    notes = []
    if any(num_matched == 0 for num_matched, _ in matched):
        notes.append("no speed-up on the same prompts: a run and its greedy have none in common")
    partial = sorted(pair for pair in matched if 0 < pair[0] < pair[1])
    if partial:
        counts = ", ".join(f"{num_matched} of {of}" for num_matched, of in partial)
        notes.append(f"same prompts: those that greedy has too ({counts} samples)")
        notes.append("published way: mean of all samples over mean of all, same prompts or not")
    return notes


def _acceptance_notes(rows: Sequence[Row]) -> list[str]:
    missing = sum(
        None in rates for row in rows if isinstance(rates := row["acceptance_rate"], tuple)
    )
    if not missing:
        return []
    runs = "1 run" if missing == 1 else f"{missing} runs"
    return [f"acceptance rate: {runs} did not log how many candidates were scored"]


def _energy_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    if any(row["energy_source"] == POWER_SAMPLES for row in rows):
        notes.append(
            f"J/token: {ESTIMATED} is an estimate, mean sampled power of the run's devices times "
            "time"
        )
    missing = sum(row["energy_source"] is None for row in rows)
    if missing:
        notes.append(f"J/token: {missing} of {len(rows)} runs recorded neither energy nor power")
    return notes
