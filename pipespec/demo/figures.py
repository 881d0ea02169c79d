"""What an evaluation is told and what it finds, as frozen dataclasses; `--json` prints them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipespec.demo.measures import Speculation

if TYPE_CHECKING:
    from pipespec.demo.real_text import PairOnText, XzFigures

PASS_AT: Final = (1, 8)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How much is measured.

    num_prompts, num_tokens: texts that each model writes, and their length. temperatures: of the
    texts beside the greedy ones. num_windows, window_length: real text, in tokens; a window's first
    half is context, its second half is scored. num_questions: of held-out arithmetic; 0 asks none.
    num_answers: to each question, of `answer_tokens` at most, at `answer_temperature`. num_samples:
    texts to show.
    """

    num_prompts: int = 40
    num_tokens: int = 96
    temperatures: tuple[float, ...] = (1.0,)
    num_windows: int = 128
    window_length: int = 512
    num_questions: int = 64
    num_answers: int = 8
    answer_tokens: int = 96
    answer_temperature: float = 0.7
    num_samples: int = 0


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model alone.

    Bits per byte are those of held-out library modules and of the other ones, tests and tables.
    distinct_4grams: of its greedy texts together. repeated_share: of the tokens of its greedy texts
    that end a 4-gram which prompt and text had before. pass_at: by k, on held-out arithmetic.
    """

    name: str
    num_parameters: int
    library_bits_per_byte: float
    other_bits_per_byte: float
    distinct_4grams: float | None
    repeated_share: float | None
    pass_at: Mapping[int, float | None]


@dataclass(frozen=True, slots=True)
class PairFigures:
    """A draft on the texts that a target writes at one temperature, with coupled noise.

    clean: the same, of the tokens that repeat no 4-gram.
    """

    draft: str
    target: str
    temperature: float
    plain: Speculation
    clean: Speculation


@dataclass(frozen=True, slots=True)
class TextSample:
    """A held-out prompt, and how the largest model goes on greedily."""

    name: str
    prompt: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that is printed, and under which conditions; models smallest first."""

    python: str
    settings: EvaluationSettings
    num_scored_bytes: int
    models: tuple[ModelFigures, ...]
    xz: XzFigures
    pairs: tuple[PairFigures, ...]
    pairs_on_text: tuple[PairOnText, ...]
    samples: tuple[TextSample, ...]
