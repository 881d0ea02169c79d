"""Tensors of a checkpoint folder by name: one safetensors file, or several with an index.

Reads one tensor at a time, so that loading needs little more memory than the model. Knows no
architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipespec.errors import ModelLoadError
from pipespec.runners.architecture import UnsupportedCheckpoint

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """An open checkpoint: `name in checkpoint`, `checkpoint[name]` -> CPU tensor as stored."""

    def __init__(self, folder: Path, files: dict[str, Any]) -> None:
        self._folder = folder
        self._files = files  # tensor name -> open safetensors file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise ModelLoadError(f"{self._folder}: the weights have no tensor {name}")
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise ModelLoadError(f"{self._folder}: tensor {name}: {error}") from error
        return tensor

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """`checkpoint[name]`, which must have the shape that the config implies."""
        tensor = self[name]
        if tuple(tensor.shape) != shape:
            has = tuple(tensor.shape)
            raise ModelLoadError(
                f"{self._folder}: tensor {name} has the shape {has}; config.json implies {shape}"
            )
        return tensor


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Opens the safetensors files of `folder` and closes them at the end.

    Raises:
        UnsupportedCheckpoint: no safetensors in the folder.
        ModelLoadError: a file that is missing or damaged.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name in _file_names(folder):
            path = folder / name
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(f"{path} is not a readable weights file: {error}") from error
            files.update(dict.fromkeys(file.keys(), file))
        yield Checkpoint(folder, files)


def _file_names(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        raise UnsupportedCheckpoint(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not an index of weights: {error!r}") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelLoadError(f"{index} names a file outside its folder")
    return names
