"""The tables of a race as text. Numbers come from `measures`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from pipespec.commands.entry import print_line
from pipespec.comparison import ablation
from pipespec.comparison.contestants import GREEDY
from pipespec.comparison.drafting import DraftRates
from pipespec.comparison.measures import Row, Spread, table_rows
from pipespec.comparison.record import Record

NOTHING: Final = "-"
_BUSY_LOAD: Final = 1.0
HEADLINES: Final = {
    "device": "Same device for the target",
    "total": "Same total hardware",
}


def print_tables(record: Record, console: Console) -> None:
    """Each table under its title, then what a reader must know beside it."""
    by_table = {table: table_rows(record, table) for table in record.metadata["tables"]}
    for table, rows in by_table.items():
        if rows:
            print_line(console, table_title(record, table))
            print_line(console, "")
            console.print(_table(rows, _columns(record.metadata)))
            print_line(console, "")
    for line in (
        *(ablation.NOTES if record.metadata.get("ablation") else ()),
        *_variant_lines(by_table),
        *_slower_lines(by_table),
        *left_out_lines(record),
        *busy_lines(record.metadata),
    ):
        print_line(console, line)


def table_title(record: Record, table: str) -> str:
    """What the table is of: hardware, models, prompts."""
    metadata = record.metadata
    models = " > ".join(model_names(metadata))
    temperature = metadata["sampling"]["temperature"]
    sampled = f", temperature {temperature:g}" if temperature else ""
    return (
        f"{what_it_is(metadata)}{HEADLINES[table]}: {metadata['tables'][table]}\n"
        f"{models}, {extent(record)}, at most {metadata['max_new_tokens']} new tokens{sampled}"
    )


def what_it_is(metadata: Mapping[str, Any]) -> str:
    """What every title begins with where not all is real."""
    kinds = [kind for kind in ("simulated", "emulated") if metadata.get(kind)]
    return f"{', '.join(kinds).upper()}: " if kinds else ""


def extent(record: Record) -> str:
    """How much was raced: "6 prompts of stdlib, 3 rounds"; simulated rounds would all be equal."""
    num_prompts = record.metadata["num_samples"]
    prompts = f"{num_prompts} prompt{_s(num_prompts)} of {record.metadata['dataset']}"
    if record.metadata.get("simulated"):
        return prompts
    num_rounds = max((turn.round for turn in record.turns), default=0)
    return f"{prompts}, {num_rounds} round{_s(num_rounds)}"


def model_names(metadata: Mapping[str, Any]) -> list[str]:
    """Short names, smallest draft first."""
    return [str(model["path"]).rstrip("/").rpartition("/")[2] for model in metadata["models"]]


def label(row: Row) -> str:
    """A contestant's name, with its best variant."""
    return ", ".join(filter(None, (row.entrant.name, row.variant)))


def left_out_lines(record: Record) -> list[str]:
    """One line for each who did not race to the end, by name and table."""
    return [
        f"left out: {entrant.key}: {entrant.left_out}"
        for entrant in record.entrants
        if entrant.left_out
    ]


def busy_lines(metadata: Mapping[str, Any]) -> list[str]:
    """A line where the machine had other work when the race began; of all there is to disturb one,
    this does it most."""
    load = metadata["load_average_before"][0]
    if load < _BUSY_LOAD or metadata.get("simulated"):
        return []
    return [f"a busy machine: load average {load:.1f} before the race; repeat it on an idle one"]


def _columns(metadata: Mapping[str, Any]) -> dict[str, Callable[[Row], str]]:
    """The text of a row, by header."""
    columns = {"tokens/s": lambda row: _speed(row.tokens_per_s.median)}
    if not metadata.get("simulated"):
        columns["slowest-\nfastest"] = _range
    columns["x greedy"] = lambda row: _ratio(row.ratio)
    if metadata.get("ablation"):
        columns["block\neffic."] = lambda row: _rates(row, lambda d: (d.block_efficiency,))
        columns["hit\nrate"] = _hit_rates
        columns["wasted"] = lambda row: _rates(row, lambda d: d.wastages)
    columns["same text\nas greedy"] = _sameness
    return columns


def _table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("contestant", no_wrap=True)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(label(row), *(text(row) for text in columns.values()))
    return table


def _range(row: Row) -> str:
    return f"{_speed(row.tokens_per_s.low)}-{_speed(row.tokens_per_s.high)}"


def _ratio(ratio: Spread | None) -> str:
    return NOTHING if ratio is None else f"{ratio.median:.2f}x"


def _hit_rates(row: Row) -> str:
    """Nothing where nobody prepares for anything."""
    prepares = row.entrant.settings.get("schedule", {}).get("outcomes")
    return _rates(row, lambda d: d.hit_rates) if prepares else NOTHING


def _rates(row: Row, which: Callable[[DraftRates], Sequence[float | None]]) -> str:
    rates = which(row.drafts) if row.drafts is not None else (None,)
    return " ".join(NOTHING if rate is None else f"{rate:.2f}" for rate in rates)


def _sameness(row: Row) -> str:
    if row.sameness is None:
        return NOTHING
    first = row.sameness.first
    if first is None:
        return NOTHING if row.entrant.name == GREEDY else "yes"
    equal = f"{row.sameness.num_equal}/{row.sameness.num_compared}"
    return f"{equal}, {first.unit} {first.position}"


def _variant_lines(by_table: Mapping[str, Sequence[Row]]) -> list[str]:
    """What the variants that are not in a table had: its row is the best of them."""
    lines = []
    for row in _rows(by_table):
        if len(row.others) > 1:
            listed = ", ".join(f"{name}: {_speed(x)}" for name, x in row.others.items())
            lines.append(f"{row.entrant.key}: the best of {listed} tokens/s")
    return lines


def _slower_lines(by_table: Mapping[str, Sequence[Row]]) -> list[str]:
    """Who would do better to leave a part of the hardware unused."""
    alone = {row.entrant.name: row.tokens_per_s.median for row in by_table.get("device", ())}
    return [
        f"{row.entrant.key}: faster with the target's device alone, {_speed(alone[name])}"
        for row in by_table.get("total", ())
        if (name := row.entrant.name) in alone and alone[name] > row.tokens_per_s.median
    ]


def _rows(by_table: Mapping[str, Iterable[Row]]) -> list[Row]:
    """All rows; who stands in both tables once."""
    found = {row.entrant.key: row for rows in by_table.values() for row in rows}
    return list(found.values())


def _speed(tokens_per_s: float) -> str:
    """Four digits or so."""
    return f"{tokens_per_s:,.{1 if tokens_per_s < 1000 else 0}f}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
