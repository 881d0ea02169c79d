"""The tables of a race as text. Numbers come from `measures`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from pipespec.comparison.contestants import GREEDY
from pipespec.comparison.measures import Row, table_rows
from pipespec.comparison.record import Record

NOTHING: Final = "-"
ROOMY_WIDTH: Final = 100
_BUSY_CORES: Final = 0.2
_SPEED, _SPEEDS, _DECODE = "tokens/s", "slowest-\nfastest", "decode\ntokens/s"
_RATIO, _RATIOS, _TEXT = "x greedy", "lowest-\nhighest", "same text\nas greedy"
_HEADERS: Final = (_SPEED, _SPEEDS, _DECODE, _RATIO, _RATIOS, _TEXT)
_NARROW_HEADERS: Final = (_SPEED, _SPEEDS, _RATIO, _TEXT)
HEADLINES: Final = {
    "device": "Same device for the target",
    "total": "Same total hardware",
}


def print_tables(record: Record, console: Console) -> None:
    """Each table under its title, then what a reader must know beside it."""
    by_table = {table: table_rows(record, table) for table in record.metadata["tables"]}
    for table, rows in by_table.items():
        if rows:
            _line(console, table_title(record, table))
            _line(console, "")
            console.print(_table(rows, console.width))
            _line(console, "")
    for line in (
        *_variant_lines(by_table),
        *_slower_lines(by_table),
        *left_out_lines(record),
        *busy_lines(record),
    ):
        _line(console, line)


def table_title(record: Record, table: str) -> str:
    """What the table is of: hardware, models, prompts."""
    metadata = record.metadata
    models = " > ".join(model_names(metadata))
    emulated = "EMULATED: " if metadata["emulated"] else ""
    return (
        f"{emulated}{HEADLINES[table]}: {metadata['tables'][table]}\n"
        f"{models}, {extent(record)}, at most {metadata['max_new_tokens']} new tokens"
    )


def extent(record: Record) -> str:
    """How much was raced: "6 prompts of stdlib, 3 rounds"."""
    num_prompts = record.metadata["num_samples"]
    num_rounds = max((turn.round for turn in record.turns), default=0)
    return (
        f"{num_prompts} prompt{_s(num_prompts)} of {record.metadata['dataset']}, "
        f"{num_rounds} round{_s(num_rounds)}"
    )


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


def busy_lines(record: Record) -> list[str]:
    """Lines for a machine that had other work to do."""
    counting = [turn for turn in record.turns if not turn.is_disturbed]
    foreign = [turn.foreign_cores for turn in counting if turn.foreign_cores is not None]
    lines = []
    if num_repeated := len(record.turns) - len(counting):
        lines.append(f"{num_repeated} turn{_s(num_repeated)} repeated because of other work")
    if foreign and max(foreign) >= _BUSY_CORES:
        lines.append(
            f"a busy machine: other work took {median(foreign):.2f} cores, at most "
            f"{max(foreign):.2f}; race again when it is idle, or with --max-foreign-cores"
        )
    return lines


def _table(rows: Sequence[Row], width: int) -> Table:
    """Below a `width` of 100 columns, those that say how sure the others are stay in the file."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("contestant", no_wrap=True)
    is_roomy = width >= ROOMY_WIDTH
    for header in _HEADERS if is_roomy else _NARROW_HEADERS:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = _cells(row)
        shown = _HEADERS if is_roomy else _NARROW_HEADERS
        table.add_row(label(row), *(cells[header] for header in shown))
    return table


def _cells(row: Row) -> dict[str, str]:
    speed, decode, ratio = row.tokens_per_s, row.decode_tokens_per_s, row.ratio
    texts = (
        _speed(speed.median),
        f"{_speed(speed.low)}-{_speed(speed.high)}",
        NOTHING if decode is None else _speed(decode.median),
        NOTHING if ratio is None else f"{ratio.median:.2f}x",
        NOTHING if ratio is None else f"{ratio.low:.2f}-{ratio.high:.2f}",
        _sameness(row),
    )
    return dict(zip(_HEADERS, texts, strict=True))


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
            listed = ", ".join(f"{name} {_speed(x)}" for name, x in row.others.items())
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


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
