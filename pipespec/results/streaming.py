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

from pipespec.errors import DataError, NothingLeftError
from pipespec.results.reading import check_metadata, result_problem

T = TypeVar("T")

# What code raises that is given a value of another kind than it expects.
MISFITS: Final = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)

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
    on_file: Callable[[Path], None] = lambda _: None,
) -> list[RunExtract[T]]:
    """The runs in files and folders; files that cannot be used are passed over.

    Args:
        paths: result files of PipeSpec or of the original, or folders, which are searched.
        keep: what of an item of `results` is kept. One of `MISFITS` says that it lacks what is
            needed; its file is passed over then.
        on_skip: is told in one line which file is passed over, and why.
        on_file: is told of each file before it is read.

    Raises:
        NothingLeftError: no file could be used.
        DataError: a path does not exist.
    """
    runs: list[RunExtract[T]] = []
    files = find_files(paths)
    for path in files:
        on_file(path)
        try:
            runs.append(read_run(path, keep))
        except DataError as error:
            on_skip(f"passed over: {error}")
    if not runs:
        raise NothingLeftError(
            f"none of {len(files)} files could be used; pass a folder of result files"
        )
    return runs


def read_run(path: Path, keep: Callable[[Mapping[str, Any]], T]) -> RunExtract[T]:
    """One file, as `read_runs`.

    Raises:
        DataError: it is not a result file, was cut off, has no samples or none with a token, or
            `keep` refused one.
    """
    metadata = read_metadata(path)
    kept: list[tuple[int, T]] = []
    has_tokens = False
    for position, result in enumerate(iterate_results(path)):
        has_tokens = has_tokens or result["metrics"]["tokens_generated"] > 0
        try:
            kept.append((result["sample_index"], keep(result)))
        except MISFITS as error:
            raise DataError(f"{path}: results[{position}] {misfit(error)}") from error
    if not kept:
        raise DataError(f"{path} has no samples")
    if not has_tokens:
        raise DataError(f"{path} has no tokens: each of its samples is empty")
    return RunExtract(path, metadata, tuple(item for _, item in sorted(kept, key=lambda x: x[0])))


def misfit(error: Exception) -> str:
    """What one of `MISFITS` says of a file, to follow its name."""
    if isinstance(error, KeyError):
        return f"lacks {error}"
    return str(error) if type(error) is ValueError else f"is of another kind ({error})"


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files that `paths` name, each once; of a folder and the folders in it, the `.json` files,
    but not those of a folder `wandb`, which W&B puts beside results.

    Raises:
        DataError: a path does not exist or is no file (a pipe can be read once only), or a folder
            without any.
    """
    files: dict[Path, Path] = {}  # by what they are, so that a file named twice counts once
    for path in paths:
        try:
            found = _files_at(path)
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise DataError(f"{path}: {error.strerror or error}") from error
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(
            item
            for item in path.rglob("*.json")
            if item.is_file() and "wandb" not in item.relative_to(path).parts[:-1]
        )
        if not found:
            raise DataError(f"{path} has no .json files; pass a folder of result files")
        return found
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder; write it to a file first")
    return [path]


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
            scanner.skip()
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
                scanner.skip()
                continue
            if has_results:
                raise DataError(f'{path} is not a result file: it has "results" twice')
            has_results = True
            for position, result in enumerate(scanner.array()):
                problem = result_problem(result)
                if problem:
                    raise DataError(f"{path} is not a result file: results[{position}] {problem}")
                result.setdefault("gpustats", [])
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
        for _ in self._elements("}"):
            if self._next() != '"':
                raise self._damaged("expecting a key")
            key = self.value()
            self._expect(":")
            yield key, self
        if self._next():
            raise self._damaged("something follows its end")

    def array(self) -> Iterator[Any]:
        """The items of the array that stands here."""
        if self._next() != "[":
            raise DataError(f'{self._path} is not a result file: "results" is no list')
        for _ in self._elements("]"):
            yield self.value()

    def skip(self) -> None:
        """Passes over the value that stands here; over an array item by item."""
        if self._next() != "[":
            self.value()
            return
        for _ in self.array():
            pass

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
            except (ValueError, RecursionError) as error:  # a number of thousands of digits
                what = "too deeply nested" if isinstance(error, RecursionError) else str(error)
                raise self._damaged(what) from error
            else:
                # "1" might be the beginning of "12", "1." that of "1.5"
                if end < len(self._text) - _NEAR_END or self._is_whole:
                    self._at = end
                    return value
            self._read(max(_CHUNK, len(self._text) - self._at))

    def _elements(self, end: str) -> Iterator[None]:
        """Stops before each element of the array or object that begins here, and after `end`."""
        self._at += 1
        if self._next() != end:
            yield
            while self._next() != end:
                self._expect(",")
                yield
        self._at += 1

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
        # What `json.loads` takes too: a byte order mark, surrogates without a partner.
        return path.open(encoding="utf-8-sig", errors="surrogatepass")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
