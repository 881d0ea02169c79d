"""Rows of data sets in files and folders, one at a time, each with the words that locate it.

Knows formats, not columns: `prompts` says what a row means. Only as many rows are read as are
asked for, where the format allows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pipespec.errors import DataError

Row = tuple[str, Mapping[str, Any]]  # ("line 3", {...})

SPLITS: Final = ("test", "validation", "train")  # the first that a set has is taken


def read_file(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl` file, or of a `.json` file that holds an array or JSON lines.

    Raises:
        DataError: naming the file, and the line where there is one.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: a data file is .jsonl or .json")
    try:
        if path.suffix == ".json" and _starts_with_bracket(path):
            yield from _read_array(path)
        else:
            yield from _read_lines(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason})") from error


def read_folder(path: Path) -> Iterator[Row]:
    """Rows of a folder that `datasets` wrote with `save_to_disk`: of the set itself, or of one
    split, test before validation before train.

    Raises:
        DataError: not such a folder, or none of these splits.
    """
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{path} is not a data set folder: it must be one that `datasets` wrote with "
            "save_to_disk, or name a .jsonl or .json file in it"
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except IndexError as error:  # what it makes of a set that was saved without rows
        raise DataError(f"{path} has no rows, or some of its files are missing") from error
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path} cannot be read as a data set ({first_line(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = choose_split(str(path), loaded)
        return number_rows(loaded[split], f"split {split} row ")
    return number_rows(loaded)


def choose_split(source: str, splits: Iterable[str]) -> str:
    """The split to take prompts from.

    Raises:
        DataError: naming the splits there are.
    """
    names = list(splits)
    chosen = next((split for split in SPLITS if split in names), None)
    if chosen is None and len(names) == 1:
        return names[0]
    if chosen is None:
        listed = ", ".join(names) or "none"
        raise DataError(f"{source} has no split {', '.join(SPLITS)} (it has: {listed})")
    return chosen


def number_rows(rows: Iterable[Mapping[str, Any]], prefix: str = "row ") -> Iterator[Row]:
    """Rows with their numbers, counted from 1 like lines."""
    for number, row in enumerate(rows, 1):
        yield f"{prefix}{number}", row


def first_line(error: BaseException) -> str:
    """The first line of an error's text, else the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _starts_with_bracket(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        return next((line.strip()[0] for line in file if line.strip()), "") == "["


def _read_array(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(_not_json(path, error.lineno, error)) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DataError(f"{path} is not JSON ({first_line(error)})") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number} is not an object")
        yield f"row {number}", row


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(_not_json(path, number, error)) from error
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is not an object")
            yield f"line {number}", row


def _not_json(path: Path, line: int, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{path} line {line} is not JSON ({error.msg} at column {error.colno})"
    return f"{path} line {line} is not JSON ({first_line(error)})"
