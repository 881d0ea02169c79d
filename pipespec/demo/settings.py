"""What the demo family is: sizes, token budgets and schedule, as frozen dataclasses.

The defaults give the shipped family. A budget is counted in tokens; minutes are only a guard.
"""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: so many steps at one window length, on text or on the target.

    `from_target` means that the model learns the target's distribution (distillation) instead of
    the text's next token.
    """

    name: str
    num_steps: int
    window_length: int
    from_target: bool = False


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model's shape and its phases; one cosine runs over all of its steps."""

    shape: ModelShape
    phases: tuple[Phase, ...]
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
    half are sampled.
    """

    top: int = 32
    num_short_windows: int = 4096
    num_long_windows: int = 640
    num_generated_windows: int = 1024
    prompt_length: int = 48
    batch_size: int = 128
    temperature: float = 0.8
    generated_share: float = 0.35


TARGET = ModelPlan(
    ModelShape("target-5M", 256, 5, 640, 64),
    (Phase("text", 1700, 256), Phase("long text", 400, 1024)),
)
MIDDLE = ModelPlan(
    ModelShape("middle-2M", 192, 3, 512, 64),
    (
        Phase("text", 350, 256),
        Phase("distillation", 800, 256, from_target=True),
        Phase("long distillation", 120, 1024, from_target=True),
    ),
)
DRAFT = ModelPlan(
    ModelShape("draft-0.5M", 96, 2, 128, 32),
    (
        Phase("text", 600, 256),
        Phase("distillation", 1500, 256, from_target=True),
        Phase("long distillation", 200, 1024, from_target=True),
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
    tokens_per_step: int = 4096
    library_share: float = 0.65
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
