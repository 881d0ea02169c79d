"""Reading result files: finished ones, of PipeSpec and of the original, and partial ones.

Files come from disks and other people, so everything that later code relies on is checked here and
a file that is something else is refused in one line that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipespec.errors import DataError
from pipespec.results.metadata import SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class RunFile:
    """A finished run: `metadata` and the `results` in the order of their sample indexes."""

    metadata: dict[str, Any]
    results: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class PartialFile:
    """What an interrupted run left. num_bytes: length of the part that is whole; after it may
    stand a line that was being written when the run ended. results: JSON text by sample index."""

    metadata: dict[str, Any] | None
    results: dict[int, str]
    num_bytes: int


def load_results(path: Path) -> RunFile:
    """Reads a finished result file, PipeSpec's or the original's.

    Raises:
        DataError: missing, cut off, not a result file, or of a newer schema; names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON or was cut off ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a result file: it holds no JSON object")
    metadata, results = content.get("metadata"), content.get("results")
    if not isinstance(metadata, dict) or not isinstance(results, list):
        raise DataError(f'{path} is not a result file: it lacks "metadata" or "results"')
    check_metadata(path, metadata)
    for position, result in enumerate(results):
        problem = result_problem(result)
        if problem:
            raise DataError(f"{path} is not a result file: results[{position}] {problem}")
        result.setdefault("gpustats", [])
    return RunFile(metadata, tuple(sorted(results, key=lambda result: result["sample_index"])))


def read_partial(path: Path) -> PartialFile:
    """Reads the JSON lines of a run that did not finish; a torn last line is left out.

    Raises:
        DataError: not readable, or a line before the last is not what a writer writes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    metadata: dict[str, Any] | None = None
    results: dict[int, str] = {}
    num_bytes = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        entry = _parse_line(path, number, line)
        if "metadata" in entry:
            metadata = {**(metadata or {}), **entry["metadata"]}
        else:
            result = entry["result"]
            results[result["sample_index"]] = to_json(result)
        num_bytes += len(line)
    if metadata is not None:
        check_metadata(path, metadata)
    return PartialFile(metadata, results, num_bytes)


def to_json(value: object) -> str:
    """Compact JSON on one line; pure ASCII, which even a lone surrogate survives."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def result_problem(result: object) -> str | None:
    """What keeps `result` from being one item of `results`, in words; None if nothing does."""
    if not isinstance(result, Mapping):
        return "is not an object"
    if type(result.get("sample_index")) is not int:
        return 'has no integer "sample_index"'
    for key in ("strategy", "output_text", "input_text"):
        if not isinstance(result.get(key), str):
            return f'has no text "{key}"'
    if not isinstance(result.get("gpustats", []), list | tuple):  # early files have none
        return 'has "gpustats" that are no list'
    metrics = result.get("metrics")
    if not isinstance(metrics, Mapping):
        return 'has no object "metrics"'
    for key in ("total_time", "tokens_generated"):
        value: Any = metrics.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            return f'has no number "metrics.{key}", 0 or more'
    if "token_times" not in metrics and not (
        "model_times" in metrics and "accepted_tokens" in metrics
    ):
        return 'has neither "metrics.token_times" nor "metrics.model_times" and "accepted_tokens"'
    return None


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict) and isinstance(entry.get("metadata"), dict):
        return entry
    if isinstance(entry, dict) and result_problem(entry.get("result")) is None:
        return entry
    raise DataError(f"{path} line {number} is damaged; --force starts the run over")


def check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Whether a result file may have these metadata.

    Raises:
        DataError: it may not; names the file.
    """
    if not isinstance(metadata.get("strategy"), str):
        raise DataError(f'{path} is not a result file: it has no text "metadata.strategy"')
    models = metadata.get("model_configs")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise DataError(f'{path} is not a result file: it has no list "metadata.model_configs"')
    version = metadata.get("schema_version", 0)  # the original has none
    if type(version) is not int or version > SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}; this PipeSpec reads up to {SCHEMA_VERSION}: "
            "update it"
        )
