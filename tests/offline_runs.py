"""Reads what W&B wrote for a run in its offline mode: records in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768
WHOLE, LAST = 1, 4


@dataclass
class OfflineRun:
    """rows: what was logged, call by call, W&B's own keys left out. tables: columns and rows."""

    name: str
    group: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read_offline_run(folder: Path) -> OfflineRun:
    (path,) = folder.glob("*.wandb")
    run = OfflineRun("", "", "")
    for record in _records(path.read_bytes()):
        if record.HasField("run"):
            run.name, run.group = record.run.display_name, record.run.run_group
            run.project = record.run.project
            run.config |= _values(record.run.config.update)
        elif record.HasField("config"):
            run.config |= _values(record.config.update)
        elif record.HasField("history"):
            row = _values(record.history.item)
            run.rows.append({key: row[key] for key in row if not key.startswith("_")})
        elif record.HasField("summary"):
            run.summary |= _values(record.summary.update)
        elif record.HasField("exit"):
            run.exit_code = record.exit.exit_code
    media = folder / "files" / "media" / "table"
    for path in media.rglob("*.table.json"):
        key = str(path.relative_to(media)).rsplit("_", 2)[0]
        run.tables[key] = json.loads(path.read_text())
    return run


def read_offline_runs(directory: Path) -> dict[str, OfflineRun]:
    """By strategy."""
    runs = [read_offline_run(folder) for folder in directory.glob("wandb/offline-run-*")]
    by_strategy = {run.config["strategy"]: run for run in runs}
    assert len(by_strategy) == len(runs)
    return by_strategy


def _values(items: Any) -> dict[str, Any]:
    names = ["/".join(item.nested_key) or item.key for item in items]
    return {name: json.loads(item.value_json) for name, item in zip(names, items, strict=True)}


def _records(data: bytes) -> Iterator[Any]:
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
