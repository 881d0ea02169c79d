"""What a pipeline would do, without processes and in seconds of computing.

The state machine and the policies are the real ones; time is the virtual clock's. A model is what
a `SimModel` says of it, whether that was measured or is a config's "emulated" object. What real
processes add between two forwards is in a prediction as far as it is given: `between_s` of each
model, the latency between processes. Without both it is the *ideal* of that pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pipespec.config import ModelConfig, SamplingParams, Schedule
from pipespec.emulation import Emulation, TokenOracle, parse_emulation
from pipespec.emulation.model import NUM_TAIL_ROWS
from pipespec.errors import ConfigError
from pipespec.messages import Submit
from pipespec.metrics import StageCounts
from pipespec.metrics.definitions import block_efficiency, outcome_hit_rate, ratio
from pipespec.policy import FIRST_MOST, make_policy
from pipespec.simulate.engine import Simulation
from pipespec.simulate.setup import SimStage
from pipespec.state.step import Role

LATENCY_S: Final = 1e-4  # from one process to the next; of no weight beside steps of ms
_VOCAB_SIZE: Final = 4096
_PAUSE_S: Final = 1e-3  # from the end of a text to the submission of the next


@dataclass(frozen=True, slots=True)
class Workload:
    """Texts to write: how many, and their lengths in tokens. The defaults are about those of the
    original's published runs: 20 of HumanEval, 110 tokens of prompt, 290 written."""

    num_texts: int = 20
    prompt_tokens: int = 110
    new_tokens: int = 290

    def submits(self) -> list[Submit]:
        """A request a text, each with its own prompt."""
        prompt = tuple(range(self.prompt_tokens - 1))
        return [
            Submit(text, (*prompt, text), (), SamplingParams(), self.new_tokens, (), ())
            for text in range(self.num_texts)
        ]


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model as a simulation knows it.

    forward_s: seconds of a forward over so many tokens in a text of so many. between_s: that its
    loop spends after each step. context_length, num_tail_rows: as of its runner. reads_meanwhile:
    that leaves the processor free during a forward (`WaitingRunner`).
    """

    forward_s: Callable[[int, int], float]
    oracle: TokenOracle
    between_s: float = 0.0
    context_length: int = 1 << 40
    num_tail_rows: int = 0
    reads_meanwhile: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """seconds: of each text, from submission to the last token. stages: the counters of each stage,
    one item a text. outputs: the texts."""

    seconds: tuple[float, ...]
    stages: tuple[tuple[StageCounts, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """In all texts."""
        return sum(map(len, self.outputs))

    @property
    def total_s(self) -> float:
        """Summed over texts."""
        return sum(self.seconds)

    @property
    def ms_per_token(self) -> float:
        """Prefill included, as in the original's `time_per_token`."""
        return 1e3 * self.total_s / self.num_tokens

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s

    @property
    def block_efficiency(self) -> float | None:
        """Of the target; None if it verified nothing."""
        target = self.stages[-1]
        num_verifications = sum(text.num_verifications for text in target)
        return block_efficiency(sum(text.num_emitted for text in target), num_verifications)

    @property
    def target_step_s(self) -> float:
        """Mean forward of the target, but for prompts; 0 if there was none."""
        times_s = [seconds for text in self.stages[-1] for seconds in text.step_times_s]
        return sum(times_s) / max(1, len(times_s))

    @property
    def busy_shares(self) -> tuple[float, ...]:
        """Of each stage: the part of the time that it spends in forwards."""
        return tuple(
            min(1.0, ratio(sum(text.forward_s for text in stage), self.total_s) or 0.0)
            for stage in self.stages
        )

    @property
    def outcome_hit_rate(self) -> float | None:
        """Of the stage before the target; None if it was not corrected, or there is none."""
        drafts = self.stages[-2] if len(self.stages) > 1 else ()
        return outcome_hit_rate(
            sum(text.num_outcome_hits for text in drafts),
            sum(text.num_corrections for text in drafts),
        )

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
    """Simulates `strategy` with emulated models by name, smallest draft first, target last, on
    texts of the workload's size, with `LATENCY_S` between processes. Deterministic."""
    sim_models = [emulated_model(name, emulation, _VOCAB_SIZE) for name, emulation in models]
    submits = (workload or Workload()).submits()
    return predict_texts(sim_models, strategy, schedule or Schedule(), submits)


def emulated_model(name: str, emulation: Emulation, vocab_size: int) -> SimModel:
    """What the emulated runner would be and draw with a tokenizer of so many ids."""
    return SimModel(
        forward_s=lambda num_tokens, _context: emulation.forward_s(num_tokens),
        oracle=emulation.oracle(min(vocab_size, emulation.vocab_size), name),
        context_length=emulation.context_length,
        num_tail_rows=NUM_TAIL_ROWS,
        reads_meanwhile=True,
    )


def predict_texts(
    models: Sequence[SimModel],
    strategy: str,
    schedule: Schedule,
    submits: Sequence[Submit],
    *,
    latency_s: float = LATENCY_S,
    num_warm_up_tokens: int = 0,
) -> Prediction:
    """Simulates `strategy` with `models`, smallest draft first, target last. Deterministic.

    Texts are written one after the other by stages that stay, as in a run: what their policies have
    learnt they keep. num_warm_up_tokens: of the first text, written before the clock counts.
    latency_s: from the end of a forward to the start of one that it causes in another process;
    `greedy` and `chain` have one process and do not pay it.
    """
    used = models[-1:] if strategy == "greedy" else models
    is_chain = strategy == "chain"
    if is_chain or len(used) == 1:
        latency_s = 0.0
    pipeline = _Pipeline(used, schedule, latency_s, is_chain)
    if num_warm_up_tokens:
        pipeline.write(submits[0], min(num_warm_up_tokens, submits[0].max_new_tokens))
    texts = [pipeline.write(submit, submit.max_new_tokens) for submit in submits]
    return Prediction(
        seconds=tuple(text.seconds for text in texts),
        stages=tuple(zip(*(text.counts for text in texts))),
        outputs=tuple(text.output for text in texts),
    )


@dataclass(frozen=True, slots=True)
class _Text:
    """One text: its tokens, how long it took, what each stage counted."""

    output: tuple[int, ...]
    seconds: float
    counts: tuple[StageCounts, ...]


class _Pipeline:
    """Stages that write one text after the other; what they learn they keep."""

    def __init__(
        self,
        models: Sequence[SimModel],
        schedule: Schedule,
        latency_s: float,
        is_chain: bool,
    ) -> None:
        self._models = models
        self._latency_s = latency_s
        self._is_chain = is_chain
        count = len(models)
        self._roles = [
            _role(index, count, model, schedule, is_chain) for index, model in enumerate(models)
        ]
        self._policies = [
            make_policy(
                schedule, is_first=index == 0, is_last=index == count - 1, overlaps=not is_chain
            )
            for index in range(count)
        ]
        self._now_s = 0.0

    def write(self, submit: Submit, max_new_tokens: int) -> _Text:
        # What a stop text would cut, max_new_tokens cuts: a simulation has no text.
        wanted = replace(submit, max_new_tokens=max_new_tokens, stop=())
        context = len(submit.prompt) + max_new_tokens // 2
        stages = [self._stage(index, context) for index in range(len(self._models))]
        simulation = Simulation(
            stages,
            [wanted],
            latency_s=self._latency_s,
            drain_first=True,
            in_turn=self._is_chain,
            verify=False,
            start_s=self._now_s,
        )
        report = simulation.run()
        seconds = report.end_s - self._now_s
        self._now_s = report.end_s + _PAUSE_S
        counts = [report.stats[index, submit.request] for index in range(len(stages))]
        return _Text(
            tuple(report.outputs[submit.request]),
            seconds,
            tuple(map(StageCounts.from_values, counts)),
        )

    def _stage(self, index: int, context: int) -> SimStage:
        """For a text of about `context` tokens."""
        model = self._models[index]
        return SimStage(
            role=lambda: self._roles[index],
            policy=lambda: self._policies[index],
            step_s=lambda num_tokens: model.forward_s(num_tokens, context),
            oracle=model.oracle,
            between_s=model.between_s,
            reads_meanwhile=model.reads_meanwhile,
        )


def _role(index: int, num_stages: int, model: SimModel, schedule: Schedule, is_chain: bool) -> Role:
    """As `stage.StageLoop` and `decoding.chain` set it up."""
    if is_chain:
        ahead = schedule.lookahead or min(schedule.run_ahead, FIRST_MOST)
        return Role(index, num_stages, ahead, ahead, context_length=model.context_length)
    return Role.of(schedule, index, num_stages, model.context_length, model.num_tail_rows)
