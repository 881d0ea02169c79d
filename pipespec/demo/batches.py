"""Token streams of the train side, and the windows that a training step sees.

A step's windows depend on the seed, the model's name and the step's number only, which is what
makes a resumed run the same as an uninterrupted one. Documents follow each other with an
end-of-text token between them; a window may begin anywhere and may span several documents.

The streams are `library` modules, `other` (tests and tables), `packages`, the `functions` of the
library and the `package_functions` once more as documents of their own, and `arithmetic` problems.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from pipespec.data.arithmetic import arithmetic_text
from pipespec.demo.corpus import SourceFile, is_library_module
from pipespec.demo.functions import function_texts
from pipespec.demo.settings import Shares
from pipespec.demo.tokenizer import END_OF_TEXT_ID
from pipespec.errors import UsageError

Tokens = npt.NDArray[np.uint16]
BATCH_TEXTS = 2000


@dataclass(frozen=True, slots=True)
class TokenStreams:
    """The train side as token streams, by name."""

    streams: Mapping[str, Tokens]

    def windows(
        self, rng: np.random.Generator, num_windows: int, length: int, shares: Shares
    ) -> torch.Tensor:
        """Random windows `[num_windows, length]`, int64, of the streams in `shares`."""
        rows = np.empty((num_windows, length), dtype=np.int64)
        for row, stream in enumerate(self._chosen(rng, num_windows, shares)):
            start = int(rng.integers(0, len(stream) - length + 1))
            rows[row] = stream[start : start + length]
        return torch.from_numpy(rows)

    def beginnings(
        self, rng: np.random.Generator, num_windows: int, length: int, shares: Shares
    ) -> torch.Tensor:
        """Like `windows`, but each begins where a document does."""
        rows = np.empty((num_windows, length), dtype=np.int64)
        for row, stream in enumerate(self._chosen(rng, num_windows, shares)):
            ends = np.flatnonzero(stream[: len(stream) - length] == END_OF_TEXT_ID)
            start = 0 if len(ends) == 0 else int(rng.choice(ends)) + 1
            rows[row] = stream[start : start + length]
        return torch.from_numpy(rows)

    def prompts(
        self,
        rng: np.random.Generator,
        num_prompts: int,
        length: int,
        beginning_shares: Shares,
        shares: Shares,
    ) -> torch.Tensor:
        """Half `beginnings`, as users prompt, then `windows`."""
        half = num_prompts // 2
        return torch.cat(
            (
                self.beginnings(rng, half, length, beginning_shares),
                self.windows(rng, num_prompts - half, length, shares),
            )
        )

    def _chosen(self, rng: np.random.Generator, count: int, shares: Shares) -> Iterator[Tokens]:
        names = [name for name, _ in shares]
        weights = np.array([share for _, share in shares])
        for _ in range(count):
            yield self.streams[names[int(rng.choice(len(names), p=weights / weights.sum()))]]


def step_rng(seed: int, name: str, step: int) -> np.random.Generator:
    """The randomness of one step of one model."""
    return np.random.default_rng((seed, zlib.crc32(name.encode("utf-8")), step))


def build_streams(
    tokenizer: Tokenizer,
    files: Sequence[SourceFile],
    packages: Sequence[SourceFile],
    folder: Path,
    num_problems: int,
    seed: int,
) -> TokenStreams:
    """Tokenize train-side files, packages and so many arithmetic problems, or read what an earlier
    run has written to `folder`."""
    texts: dict[str, Callable[[], Iterable[str]]] = {
        "library": lambda: _texts(files, library=True),
        "other": lambda: _texts(files, library=False),
        "packages": lambda: (file.text() for file in packages),
        "functions": lambda: function_texts(files),
        "package_functions": lambda: function_texts(packages),
        "arithmetic": lambda: arithmetic_text(num_problems, seed),
    }
    for name, make_texts in texts.items():
        if not _path(folder, name).exists():
            _write(_path(folder, name), tokenizer, make_texts())
    return TokenStreams({name: np.load(_path(folder, name)) for name in texts})


def require_length(streams: TokenStreams, length: int) -> None:
    """Refuse a corpus with a stream shorter than one window."""
    name, tokens = min(streams.streams.items(), key=lambda item: len(item[1]))
    if len(tokens) <= length:
        raise UsageError(
            f"the {name} texts here have {len(tokens)} tokens, fewer than a window of {length}; "
            "use a Python whose standard library and its test folder are installed"
        )


def _texts(files: Sequence[SourceFile], library: bool) -> Iterator[str]:
    return (file.text() for file in files if is_library_module(file.module_name) == library)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _write(path: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    pieces: list[npt.NDArray[np.uint16]] = []
    separator = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    for batch in batched(texts):
        for encoding in tokenizer.encode_batch_fast(batch):
            pieces += [np.array(encoding.ids, dtype=np.uint16), separator]
    save_array(path, np.concatenate(pieces) if pieces else separator)


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists that together fill little memory when they are encoded."""
    rest = iter(texts)
    while batch := list(islice(rest, BATCH_TEXTS)):
        yield batch


def save_array(path: Path, array: npt.NDArray[np.generic]) -> None:
    """Write an array so that a killed run leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        np.save(stream, array)
    partial.replace(path)
