"""What the process of a contestant can do once its models are loaded: write a text, and time it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipespec.comparison.drafting import StageSums


@dataclass(frozen=True, slots=True)
class Answer:
    """One text. seconds: from the request to the last token. first_token_s, num_first_tokens: when
    the first tokens came, and how many they were. stages: of ours, what each counted."""

    token_ids: tuple[int, ...]
    seconds: float
    first_token_s: float
    num_first_tokens: int
    stages: tuple[StageSums, ...] = ()


class Speaker(Protocol):
    """A contestant with its models loaded. info: what the file shall say of it."""

    info: dict[str, Any]

    def generate(
        self, ids: list[int], max_new_tokens: int, variant: Mapping[str, Any]
    ) -> Answer: ...
