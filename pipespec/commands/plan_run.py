"""The run that follows a plan: the same prompts, real processes, measured beside predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipespec.commands.display import Display
from pipespec.commands.inputs import read_inputs
from pipespec.commands.plan_tables import Trial
from pipespec.commands.runs import plan_run, run_strategy
from pipespec.commands.settings import Settings
from pipespec.config import ModelConfig
from pipespec.metrics import summarise
from pipespec.planning.system import Choice, Cost, System
from pipespec.results import describe_environment, load_results


def models_of(choice: Choice, models: Sequence[ModelConfig]) -> tuple[ModelConfig, ...]:
    """The models that a choice runs."""
    return tuple(models[stage] for stage in choice.stages)


def run_choices(
    choices: Sequence[Choice],
    system: System,
    settings: Settings,
    num_samples: int,
    output_dir: Path | None,
    display: Display,
) -> list[Trial]:
    """Runs greedy, which must come first, and the others as `pipespec.benchmark` would with a
    models config of just their models. output_dir: None for results/plan/DATASET.

    Raises:
        PipeSpecError: as that.
    """
    trials: list[Trial] = []
    greedy: Sequence[Any] = ()
    environment = describe_environment()
    for choice in choices:
        # Greedy's target is placed as one of all.
        is_greedy = choice.strategy == "greedy"
        chosen = replace(
            settings,
            strategies=(choice.strategy,),
            models=settings.models if is_greedy else models_of(choice, settings.models),
            schedule=choice.schedule,
        )
        inputs = read_inputs(chosen, num_samples)
        folder = output_dir or Path("results") / "plan" / inputs.dataset.name
        run = plan_run(
            choice.strategy, chosen, inputs, folder, environment, force=True, resume=False
        )
        run_strategy(run, chosen, inputs, greedy, display)
        results = load_results(run.path).results
        greedy = results if is_greedy else greedy
        predictions = {cost: system.predict(choice, cost=cost) for cost in Cost}
        summary, step_s = summarise(results), _target_step_s(results)
        trials.append(Trial(choice, run.path, summary, step_s, predictions))
    return trials


def _target_step_s(results: Sequence[Any]) -> float:
    """Mean seconds of a forward of the target, but for prompts."""
    metrics = [result["metrics"] for result in results]
    seconds = sum(each["forward_times_s"][-1] - each["prefill_times_s"][-1] for each in metrics)
    return float(seconds / max(1, sum(each["num_steps"][-1] for each in metrics)))
