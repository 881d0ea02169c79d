"""How fast each model is by itself: the greedy runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pipespec.errors import NothingLeftError
from pipespec.statistics.groups import Group
from pipespec.statistics.tables import Column, Row, Table

_COLUMNS: Final = (
    Column("dataset"),
    Column("text_settings"),
    Column("model", "model", is_text=True),
    Column("num_samples", "samples", rank=2),
    Column("num_tokens", "tokens", rank=3),
    Column("ms_per_token", "ms/token", digits=2, rank=1),
    Column("tokens_per_s", "tokens/s", digits=2),
    Column("file", is_text=True),
)


def baseline_tables(groups: Iterable[Group]) -> list[Table]:
    """A table for each data set, fastest model first.

    Raises:
        NothingLeftError: there is no greedy run.
    """
    by_title: dict[str, list[Row]] = {}
    for group in groups:
        title = ", ".join(filter(None, (group.dataset, group.text_settings)))
        for item in group.runs:
            if item.run.metadata["strategy"] == "greedy":
                by_title.setdefault(title, []).append(
                    {
                        "dataset": group.dataset,
                        "text_settings": group.text_settings,
                        "model": group.target,
                        "num_samples": item.summary.num_samples,
                        "num_tokens": item.summary.num_tokens,
                        "ms_per_token": item.summary.ms_per_token,
                        "tokens_per_s": item.summary.tokens_per_s,
                        "file": str(item.run.path),
                    }
                )
    if not by_title:
        raise NothingLeftError(
            "no file is of a greedy run; write one with python -m pipespec.benchmark "
            "--strategy greedy"
        )
    return [
        Table(f"{title}, greedy", _COLUMNS, tuple(sorted(rows, key=_slowness)))
        for title, rows in by_title.items()
    ]


def _slowness(row: Row) -> tuple[float, str]:
    rate = row["tokens_per_s"]
    return -rate if isinstance(rate, float) else 0.0, str(row["model"])
