"""What the user can set: sampling, generation, models. Frozen values, checked where they are made.

Command-line defaults are read from these dataclasses. This module reads no environment and knows
no device, process or tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipespec.errors import ConfigError, UsageError

DTYPES: Final = ("float32", "bfloat16", "float16")
QUANTIZATIONS: Final = ("8bit", "4bit")
RUNNERS: Final = ("auto", "llama", "hf", "emulated")
STRATEGIES: Final = ("greedy", "chain", "async-chain")
POLICIES: Final = ("adaptive", "pipespec")


def _require(flag: str, value: float, holds: bool, wanted: str) -> None:
    if not holds or not math.isfinite(value):
        raise UsageError(f"--{flag} is {value}; it must be {wanted}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen from logits; the same at every stage.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0
    keeps all, else drops tokens less likely than min_p times the most likely one. seed: of the
    coupled noise; the text is a function of target, prompt, these five values and nothing else.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0 <= self.temperature <= 1e4, "from 0 to 10000")
        _require("top-p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _require("top-k", self.top_k, 0 <= self.top_k < 1 << 31, "0 (off) or a positive integer")
        _require("min-p", self.min_p, 0.0 <= self.min_p < 1.0, "from 0 to below 1")
        _require("seed", self.seed, 0 <= self.seed < 1 << 63, "an integer from 0 to 2**63 - 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def as_tuple(self) -> tuple[float, float, int, float, int]:
        """The wire form."""
        return (self.temperature, self.top_p, self.top_k, self.min_p, self.seed)


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """One request's limits. `stop`: texts that end the output (cut before the first of them)."""

    max_new_tokens: int = 128
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        _require("max-new-tokens", count, 1 <= count < 1 << 22, "a positive integer")
        if any(not text for text in self.stop):
            raise UsageError("--stop: a stop text is empty; leave it out")


@dataclass(frozen=True, slots=True)
class Schedule:
    """When stages draft and verify.

    policy: "adaptive" (measured waiting, the default) or "pipespec" (the original's: verify
    whatever is there). lookahead: candidates a verifier waits for; None lets the policy choose;
    chain drafts exactly so many. run_ahead: tokens a stage may be ahead of the last verdict.
    """

    policy: str = "adaptive"
    lookahead: int | None = None
    run_ahead: int = 16

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"--policy is {self.policy}; it must be one of {', '.join(POLICIES)}")
        if self.lookahead is not None:
            _require("lookahead", self.lookahead, 0 <= self.lookahead <= 1024, "from 0 to 1024")
        _require("run-ahead", self.run_ahead, 1 <= self.run_ahead <= 4096, "from 1 to 4096")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One entry of a models config: a stage, smallest draft first, target last.

    path: a local folder, a hub name, or `pipespec:demo/NAME` for a model shipped with PipeSpec.
    devices: as the user wrote them, always a tuple: ("cuda:0",), ("cuda:0", "cuda:1"), ("cpu",),
    ("cpu:0",), ("auto",).
    """

    path: str
    devices: tuple[str, ...]
    dtype: str = "bfloat16"
    quantize: str | None = None
    runner: str = "auto"
    threads: int | None = None
    max_memory_gib: float | None = None
    tokenizer: str | None = None
    emulated: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def name(self) -> str:
        """What file names and tables call the model: the last part of its path."""
        return Path(self.path.rstrip("/")).name


def load_models_config(path: Path) -> tuple[ModelConfig, ...]:
    """Reads a models config: the original's JSON array, smallest draft first, target last.

    Raises:
        ConfigError: naming the file, the entry and the key.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return tuple(ModelConfig(**entry) for entry in entries)
