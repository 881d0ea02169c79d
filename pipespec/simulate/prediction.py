"""What the emulated models of a config would do, without processes and in seconds of computing.

The state machine and the policies are the real ones; time is the virtual clock's. What is not in it
is what real processes add: Python between the steps, cores that are not free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pipespec.config import ModelConfig, SamplingParams, Schedule
from pipespec.emulation import Emulation, parse_emulation
from pipespec.errors import ConfigError
from pipespec.messages import Submit
from pipespec.metrics import StageCounts
from pipespec.policy import FIRST_MOST, make_policy
from pipespec.simulate.engine import Simulation
from pipespec.simulate.setup import SimStage
from pipespec.state.step import Role

LATENCY_S: Final = 1e-4  # from one process to the next; of no weight beside steps of ms
_VOCAB_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """Texts to write: how many, and their lengths in tokens. The defaults are about those of the
    original's published runs: 20 of HumanEval, 110 tokens of prompt, 290 written."""

    num_texts: int = 20
    prompt_tokens: int = 110
    new_tokens: int = 290


@dataclass(frozen=True, slots=True)
class Prediction:
    """num_tokens in all texts; total_s from submission to the last token, summed over texts.
    stages: the counters of each stage, one item a text."""

    num_tokens: int
    total_s: float
    stages: tuple[tuple[StageCounts, ...], ...]

    @property
    def ms_per_token(self) -> float:
        """Prefill included, as in the original's `time_per_token`."""
        return 1e3 * self.total_s / self.num_tokens

    def emitted(self, stage: int) -> list[int]:
        """Tokens of each verification of a stage, bonus or correction token included: the
        original's `accepted_tokens`."""
        return [count for text in self.stages[stage] for count in text.emitted if count]


def emulations_of(models: Sequence[ModelConfig]) -> list[tuple[str, Emulation]]:
    """Names and what the models imitate.

    Raises:
        ConfigError: a model that is not emulated, or whose "emulated" object is wrong.
    """
    found = []
    for model in models:
        if model.emulated is None:
            raise ConfigError(f'{model.name} is not emulated; it lacks the key "emulated"')
        found.append((model.name, parse_emulation(model.emulated, model.name)))
    return found


def predict(
    models: Sequence[tuple[str, Emulation]],
    strategy: str,
    schedule: Schedule | None = None,
    workload: Workload | None = None,
) -> Prediction:
    """Simulates `strategy` with models by name, smallest draft first, target last. Deterministic.

    Texts are written one after the other, each on its own prompt.
    """
    schedule, workload = schedule or Schedule(), workload or Workload()
    used = models[-1:] if strategy == "greedy" else models
    is_chain = strategy == "chain"
    total_s, counts = 0.0, list[list[StageCounts]]([] for _ in used)
    for text in range(workload.num_texts):
        prompt = tuple(range(workload.prompt_tokens - 1))
        submit = Submit(text, (*prompt, text), (), SamplingParams(), workload.new_tokens, (), ())
        stages = [
            _stage(index, len(used), name, emulation, schedule, is_chain)
            for index, (name, emulation) in enumerate(used)
        ]
        latency_s = 0.0 if is_chain or len(used) == 1 else LATENCY_S
        simulation = Simulation(
            stages, [submit], latency_s=latency_s, in_turn=is_chain, verify=False
        )
        report = simulation.run()
        total_s += report.end_s
        for index in range(len(used)):
            counts[index].append(StageCounts.from_values(report.stats[index, text]))
    num_tokens = workload.num_texts * workload.new_tokens
    return Prediction(num_tokens, total_s, tuple(tuple(items) for items in counts))


def _stage(
    index: int,
    num_stages: int,
    name: str,
    emulation: Emulation,
    schedule: Schedule,
    is_chain: bool,
) -> SimStage:
    """As `stage.StageLoop` and `decoding.chain` set them up."""
    ahead = schedule.run_ahead
    if is_chain:
        ahead = schedule.lookahead or min(ahead, FIRST_MOST)

    return SimStage(
        role=lambda: Role(index, num_stages, ahead, ahead),
        policy=lambda: make_policy(schedule, is_first=index == 0, overlaps=not is_chain),
        step_s=emulation.forward_s,
        oracle=emulation.oracle(min(_VOCAB_SIZE, emulation.vocab_size), name),
    )
