"""Reading result files sample by sample, so that their size does not matter: a file of 500 MB takes
as much memory as its largest sample.

What a caller keeps of a sample is its own choice (`read_runs`). Files that are no result files are
named and passed over, because folders of results also hold other things.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pipespec.errors import DataError
from pipespec.results.reading import check_metadata, result_problem

T = TypeVar("T")

_CHUNK: Final = 1 << 20  # characters
_NEAR_END: Final = 16  # an error so near the end of what was read may be no more than that end


@dataclass(frozen=True, slots=True)
class RunExtract(Generic[T]):
    """What was kept of a run: one item of `samples` for each sample, in the order of their
    indexes."""

    path: Path
    metadata: dict[str, Any]
    samples: tuple[T, ...]


def read_runs(
    paths: Iterable[Path],
    keep: Callable[[Mapping[str, Any]], T],
    on_skip: Callable[[str], None],
) -> list[RunExtract[T]]:
    """The runs in files and folders; files that cannot be used are passed over.

    Args:
        paths: result files of PipeSpec or of the original, or folders, which are searched.
        keep: what of an item of `results` is kept. A KeyError, TypeError, ValueError or IndexError
            says that it lacks what is needed; its file is passed over then.
        on_skip: is told in one line which file is passed over, and why.

    Raises:
        DataError: nothing was left, or a path does not exist.
    """
    runs: list[RunExtract[T]] = []
    files = find_files(paths)
    for path in files:
        try:
            runs.append(read_run(path, keep))
        except DataError as error:
            on_skip(f"passed over: {error}")
    if not runs:
        raise DataError(f"none of {len(files)} files could be used; pass a folder of result files")
    return runs


def read_run(path: Path, keep: Callable[[Mapping[str, Any]], T]) -> RunExtract[T]:
    """One file, as `read_runs`.

    Raises:
        DataError: it is not a result file, was cut off, has no samples, or `keep` refused one.
    """
    metadata = read_metadata(path)
    kept: list[tuple[int, T]] = []
    for position, result in enumerate(iterate_results(path)):
        try:
            kept.append((result["sample_index"], keep(result)))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}: results[{position}] {what}") from error
    if not kept:
        raise DataError(f"{path} has no samples")
    return RunExtract(path, metadata, tuple(item for _, item in sorted(kept, key=lambda x: x[0])))


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files that `paths` name; of a folder and the folders in it, the `.json` files, but not
    those of a folder `wandb`, which W&B puts beside results.

    Raises:
        DataError: a path does not exist, or a folder without any.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(
                item
                for item in path.rglob("*.json")
                if item.is_file() and "wandb" not in item.relative_to(path).parts[:-1]
            )
            if not found:
                raise DataError(f"{path} has no .json files; pass a folder of result files")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"there is no file or folder {path}")
    return files


def read_metadata(path: Path) -> dict[str, Any]:
    """The `metadata` of a result file, checked.

    Raises:
        DataError: it is not a result file.
    """
    with _open(path) as file:
        for key, scanner in _Scanner(path, file).items():
            if key == "metadata":
                metadata = scanner.value()
                if not isinstance(metadata, dict):
                    break
                check_metadata(path, metadata)
                return metadata
            scanner.skip(key)
    raise DataError(f'{path} is not a result file: it lacks "metadata"')


def iterate_results(path: Path) -> Iterator[dict[str, Any]]:
    """The items of `results`, each checked, one at a time and in the file's order.

    Raises:
        DataError: it is not a result file, or was cut off.
    """
    has_results = False
    with _open(path) as file:
        for key, scanner in _Scanner(path, file).items():
            if key != "results":
                scanner.skip(key)
                continue
            has_results = True
            for position, result in enumerate(scanner.array()):
                problem = result_problem(result)
                if problem:
                    raise DataError(f"{path} is not a result file: results[{position}] {problem}")
                yield result
    if not has_results:
        raise DataError(f'{path} is not a result file: it lacks "results"')


class _Scanner:
    """Values of a JSON text that is read piece by piece."""

    def __init__(self, path: Path, file: TextIOWrapper) -> None:
        self._path = path
        self._file = file
        self._text = ""
        self._at = 0
        self._is_whole = False  # nothing is left to read
        self._decoder = json.JSONDecoder()

    def items(self) -> Iterator[tuple[str, _Scanner]]:
        """The keys of the object that the text is; the caller reads or skips each value."""
        if self._next() != "{":
            raise DataError(f"{self._path} is not a result file: it holds no JSON object")
        self._at += 1
        while self._next() != "}":
            key = self.value()
            self._expect(":")
            yield str(key), self
            if self._next() != "}":
                self._expect(",")

    def array(self) -> Iterator[Any]:
        """The items of the array that stands here."""
        if self._next() != "[":
            raise DataError(f'{self._path} is not a result file: "results" is no list')
        self._at += 1
        while self._next() != "]":
            yield self.value()
            if self._next() != "]":
                self._expect(",")
        self._at += 1

    def skip(self, key: str) -> None:
        """Passes over the value of a key; of `results`, item by item."""
        if key == "results" and self._next() == "[":
            for _ in self.array():
                pass
        else:
            self.value()

    def value(self) -> Any:
        """The value that stands here."""
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                if self._is_whole or not (is_open or error.pos >= len(self._text) - _NEAR_END):
                    raise self._damaged(error.msg) from error
            except RecursionError as error:
                raise self._damaged("too deeply nested") from error
            else:
                if end < len(self._text) or self._is_whole:  # a number might go on
                    self._at = end
                    return value
            self._read(max(_CHUNK, len(self._text) - self._at))

    def _next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_whole:
                return ""
            self._read(_CHUNK)

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise self._damaged(f"expecting {character!r}")
        self._at += 1

    def _read(self, count: int) -> None:
        """Reads on and forgets what was used."""
        try:
            more = self._file.read(count)
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise self._damaged(str(error)) from error
        self._is_whole = not more
        self._text, self._at = self._text[self._at :] + more, 0

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._path} is not JSON or was cut off ({reason})")


def _open(path: Path) -> TextIOWrapper:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
