"""The run that follows a plan: the same prompts, real processes, measured beside predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipespec.commands.display import Display
from pipespec.commands.inputs import read_inputs
from pipespec.commands.plan_tables import Outcome
from pipespec.commands.runs import plan_run, run_strategy
from pipespec.commands.settings import Settings
from pipespec.config import ModelConfig
from pipespec.metrics import summarise
from pipespec.planning.system import Choice, Cost, System
from pipespec.results import load_results


def models_of(choice: Choice, models: Sequence[ModelConfig]) -> tuple[ModelConfig, ...]:
    """The models that a choice runs."""
    return tuple(models[stage] for stage in choice.stages)


@dataclass(slots=True)
class Runs:
    """Runs choices one after the other, greedy first: the others are compared with its text.

    output_dir: for the result files; None for results/plan/DATASET.
    """

    settings: Settings
    num_samples: int
    output_dir: Path | None
    system: System
    _greedy: Sequence[Any] = field(default=())

    def run(self, choice: Choice, display: Display) -> Outcome:
        """As `pipespec.benchmark` would run it, with a models config of just its models.

        Raises:
            PipeSpecError: as that.
        """
        models = self.settings.models
        if choice.strategy != "greedy":  # whose target is placed as one of all
            models = models_of(choice, models)
        settings = replace(
            self.settings, strategies=(choice.strategy,), models=models, schedule=choice.schedule
        )
        inputs = read_inputs(settings, self.num_samples)
        folder = self.output_dir or Path("results") / "plan" / inputs.dataset.name
        run = plan_run(choice.strategy, settings, inputs, folder, force=True, resume=False)
        run_strategy(run, settings, inputs, self._greedy, display)
        results = load_results(run.path).results
        if choice.strategy == "greedy":
            self._greedy = results
        return self._outcome(choice, run.path, results)

    def _outcome(self, choice: Choice, path: Path, results: Sequence[Any]) -> Outcome:
        summary = summarise(results)
        assert summary.tokens_per_s is not None
        predicted = {cost: self.system.predict(choice, cost=cost) for cost in Cost}
        real = predicted[Cost.REAL]
        is_alone = choice.strategy == "greedy"
        return Outcome(
            choice=choice,
            path=path,
            measured=summary.tokens_per_s,
            predicted=real.tokens_per_s,
            ideal=predicted[Cost.IDEAL].tokens_per_s,
            shared=predicted[Cost.SHARED].tokens_per_s,
            measured_block=None if is_alone else summary.block_efficiency[-1],
            predicted_block=None if is_alone else real.block_efficiency,
            measured_hits=None if is_alone else summary.outcome_hit_rate[-1],
            predicted_hits=real.outcome_hit_rate,
        )
