"""PipeSpec: asynchronous, hierarchical speculative decoding.

A hierarchy of models, smallest draft first, each its own process; the text is exactly what the
last one, the target, would write alone. Importing this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipespec.config import GenerationParams, SamplingParams, Schedule
    from pipespec.decoding import (
        AsyncChainSpeculativeDecoder,
        ChainSpeculativeDecoder,
        Generation,
        GreedyDecoder,
        load,
        open_hierarchy,
    )

__version__ = "0.1.0"
__all__ = [
    "AsyncChainSpeculativeDecoder",
    "ChainSpeculativeDecoder",
    "Generation",
    "GenerationParams",
    "GreedyDecoder",
    "SamplingParams",
    "Schedule",
    "load",
    "open_hierarchy",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipespec import config, decoding

    return getattr(config if hasattr(config, name) else decoding, name)
