"""Token streams of the train side, and the windows that a training step sees.

A step's windows depend on the seed, the model's name and the step's number only, which is what
makes a resumed run the same as an uninterrupted one. Documents follow each other with an
end-of-text token between them; a window may begin anywhere and may span two documents.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from pipespec.demo.corpus import SourceFile, is_table_module, is_test_module
from pipespec.demo.tokenizer import END_OF_TEXT_ID
from pipespec.errors import UsageError

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class TokenStreams:
    """The train side as two token streams: library modules, and tests together with tables."""

    library: Tokens
    other: Tokens
    library_share: float

    def windows(self, rng: np.random.Generator, num_windows: int, length: int) -> torch.Tensor:
        """Random windows `[num_windows, length]`, int64; `library_share` of them from library."""
        rows = np.empty((num_windows, length), dtype=np.int64)
        for row in range(num_windows):
            stream = self.library if rng.random() < self.library_share else self.other
            start = int(rng.integers(0, len(stream) - length + 1))
            rows[row] = stream[start : start + length]
        return torch.from_numpy(rows)


def step_rng(seed: int, name: str, step: int) -> np.random.Generator:
    """The randomness of one step of one model."""
    return np.random.default_rng((seed, zlib.crc32(name.encode("utf-8")), step))


def build_streams(
    tokenizer: Tokenizer, files: Sequence[SourceFile], folder: Path, library_share: float
) -> TokenStreams:
    """Tokenize train-side files, or read what an earlier run has written to `folder`."""
    library, other = folder / "library.npy", folder / "other.npy"
    if not (library.exists() and other.exists()):
        is_other = [is_test_module(f.module_name) or is_table_module(f.module_name) for f in files]
        _write(library, tokenizer, [f for f, odd in zip(files, is_other, strict=True) if not odd])
        _write(other, tokenizer, [f for f, odd in zip(files, is_other, strict=True) if odd])
    return TokenStreams(np.load(library), np.load(other), library_share)


def require_length(streams: TokenStreams, length: int) -> None:
    """Refuse a corpus with a stream shorter than one window."""
    shortest = min(len(streams.library), len(streams.other))
    if shortest <= length:
        raise UsageError(
            f"the standard library here has {shortest} tokens of one kind, fewer than a window of "
            f"{length}; use a Python whose standard library and its test folder are installed"
        )


def _write(path: Path, tokenizer: Tokenizer, files: Sequence[SourceFile]) -> None:
    pieces: list[npt.NDArray[np.uint16]] = []
    separator = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    for encoding in tokenizer.encode_batch_fast([file.text() for file in files]):
        pieces += [np.array(encoding.ids, dtype=np.uint16), separator]
    save_array(path, np.concatenate(pieces) if pieces else separator)


def save_array(path: Path, array: npt.NDArray[np.generic]) -> None:
    """Write an array so that a killed run leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        np.save(stream, array)
    partial.replace(path)
