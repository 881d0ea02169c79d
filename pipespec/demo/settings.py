"""What the demo family is: sizes, token budgets and schedule, as frozen dataclasses.

The defaults give the shipped family. A budget is counted in tokens; minutes are only a guard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_THREADS: Final = 1024  # more are a slip of the hand, and torch takes no larger number well


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One Llama's sizes; embeddings are tied and every head has its own keys and values."""

    name: str
    hidden_size: int
    num_layers: int
    intermediate_size: int
    head_dim: int

    @property
    def num_heads(self) -> int:
        """Attention heads; the hidden size is a whole number of heads."""
        assert self.hidden_size % self.head_dim == 0
        return self.hidden_size // self.head_dim


Shares = tuple[tuple[str, float], ...]  # stream's name, its weight among those named

# The standard library is what prompts come from, and small: shares keep it to about two readings.
TEXT: Shares = (("library", 0.20), ("other", 0.15), ("packages", 0.52), ("arithmetic", 0.13))
LONG_TEXT: Shares = (("library", 0.30), ("other", 0.10), ("packages", 0.60))
FUNCTIONS: Shares = (
    ("functions", 0.30), ("package_functions", 0.35), ("library", 0.17), ("arithmetic", 0.18),
)  # fmt: skip
BEGINNINGS: Shares = (("functions", 0.50), ("package_functions", 0.30), ("arithmetic", 0.20))
CODE_BEGINNINGS: Shares = (("functions", 0.50), ("package_functions", 0.50))
CODE: Shares = (("functions", 0.30), ("package_functions", 0.30), ("library", 0.40))


@dataclass(frozen=True, slots=True)
class LoopCure:
    """What the target writes greedily in a step, to learn from it not to repeat itself.

    Half of the texts go on from the beginning of a document, half from any text; a token that ends
    an `ngram`-gram for the second time is made less likely. weight: of that loss beside the text's.
    """

    num_texts: int = 32
    prompt_length: int = 48
    text_length: int = 176
    ngram: int = 4
    weight: float = 1.0
    beginning_shares: Shares = CODE_BEGINNINGS
    shares: Shares = CODE


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: so many steps at one window length, on text or on the target.

    shares: which text, and how much of each. from_target: the model learns the target's
    distribution (distillation) instead of the text's next token. loop_cure: the model learns from
    its own greedy text as well. learning_rate_share: of the peak, instead of the cosine's.
    """

    name: str
    num_steps: int
    window_length: int
    shares: Shares = TEXT
    from_target: bool = False
    loop_cure: LoopCure | None = None
    learning_rate_share: float | None = None


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model's shape and its phases; one cosine runs over all of its steps."""

    shape: ModelShape
    phases: tuple[Phase, ...]
    tokens_per_step: int = 4096
    matrix_learning_rate: float = 5e-3
    embedding_learning_rate: float = 2e-3

    @property
    def num_steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.num_steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that a step, counted from 0, belongs to."""
        for phase in self.phases:
            if step < phase.num_steps:
                return phase
            step -= phase.num_steps
        raise AssertionError("a step past the end of the plan")


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """How much of the target's opinion is written down for the smaller models to learn from.

    The `top` likeliest tokens of each position are kept. Half of the generated windows are greedy,
    half are sampled; half begin with the beginning of a document, half with any text.
    """

    top: int = 32
    num_short_windows: int = 6144
    num_long_windows: int = 768
    num_generated_windows: int = 12288
    short_shares: Shares = (
        ("library", 0.25), ("other", 0.10), ("packages", 0.25), ("functions", 0.15),
        ("package_functions", 0.15), ("arithmetic", 0.10),
    )  # fmt: skip
    long_shares: Shares = LONG_TEXT
    beginning_shares: Shares = BEGINNINGS
    prompt_length: int = 48
    batch_size: int = 128
    temperature: float = 0.8
    generated_share: float = 0.6


TARGET = ModelPlan(
    ModelShape("target-12M", 384, 6, 960, 64),
    (
        Phase("text", 3300, 256),
        Phase("long text", 300, 1024, LONG_TEXT),
        Phase("functions", 600, 512, FUNCTIONS),
        Phase("own text", 60, 256, FUNCTIONS, loop_cure=LoopCure(), learning_rate_share=0.05),
    ),
    tokens_per_step=8192,
    matrix_learning_rate=4e-3,
)
MIDDLE = ModelPlan(
    ModelShape("middle-2M", 224, 2, 448, 32),
    (
        Phase("text", 500, 256),
        Phase("distillation", 3800, 256, from_target=True),
        Phase("long distillation", 200, 1024, from_target=True),
    ),
)
DRAFT = ModelPlan(
    ModelShape("draft-1M", 160, 1, 512, 32),
    (
        Phase("text", 600, 256),
        Phase("distillation", 12100, 256, from_target=True),
        Phase("long distillation", 300, 1024, from_target=True),
    ),
)


@dataclass(frozen=True, slots=True)
class FamilyPlan:
    """Everything that decides what comes out of a training run."""

    target: ModelPlan = TARGET
    drafts: tuple[ModelPlan, ...] = (MIDDLE, DRAFT)
    teacher: TeacherPlan = TeacherPlan()
    vocab_size: int = 4096
    max_positions: int = 1024
    short_length: int = 256
    long_length: int = 1024
    num_problems: int = 60_000
    warmup_steps: int = 100
    final_learning_rate_share: float = 0.03
    weight_decay: float = 0.05
    seed: int = 0
    compile: bool = True
    bf16: bool = True

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        """Every model's plan, smallest first, as the family's folders are listed."""
        return (*reversed(self.drafts), self.target)
