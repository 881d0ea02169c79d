"""A device that is out of memory, told in one line instead of an allocator's traceback.

Knows how torch reports it on CPU and GPU, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipespec.errors import PipeSpecError


@contextmanager
def out_of_memory_as(kind: type[PipeSpecError], message: str) -> Iterator[None]:
    """Turns an allocation that fails in the body into `kind(message)`; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise kind(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; on the CPU torch raises a RuntimeError like any other."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
