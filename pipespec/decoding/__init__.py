"""Decoding strategies behind one contract: `generate()` and `stream()` of any `Decoder`.

from pipespec import load
with load("configs/models/demo.json") as decoder:
    for piece in decoder.stream("def mean(values):"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from pathlib import Path

from pipespec.config import STRATEGIES, Schedule, find_models_config, load_models_config
from pipespec.decoding.async_chain import AsyncChainSpeculativeDecoder
from pipespec.decoding.base import Decoder, Generation
from pipespec.decoding.chain import ChainSpeculativeDecoder
from pipespec.decoding.greedy import GreedyDecoder
from pipespec.decoding.hierarchy import Hierarchy, open_hierarchy
from pipespec.errors import UsageError

__all__ = [
    "AsyncChainSpeculativeDecoder",
    "ChainSpeculativeDecoder",
    "Decoder",
    "Generation",
    "GreedyDecoder",
    "Hierarchy",
    "load",
    "open_hierarchy",
]


def load(
    models_config_path: str | Path = "configs/models/demo.json",
    strategy: str = "async-chain",
    schedule: Schedule | None = None,
) -> GreedyDecoder | ChainSpeculativeDecoder | AsyncChainSpeculativeDecoder:
    """A decoder for a models config, its models loaded and its processes running.

    Raises:
        UsageError: naming the flag, file or model that does not fit, and what to do.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy is {strategy}; it must be one of {', '.join(STRATEGIES)}")
    path = find_models_config(str(models_config_path))
    models = load_models_config(path)
    hierarchy = open_hierarchy(models, target_only=strategy == "greedy")
    if strategy == "greedy":
        return GreedyDecoder(hierarchy)
    if strategy == "chain":
        return ChainSpeculativeDecoder(hierarchy, schedule)
    return AsyncChainSpeculativeDecoder(hierarchy, schedule)
