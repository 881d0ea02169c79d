"""The race of emulated models without processes: every turn on a virtual clock, in seconds.

The state machine, the policies and the texts are those of the real race. What loops and messages
add is what the planner assumes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipespec.commands.inputs import Inputs
from pipespec.comparison.contestants import Contestant, Variant
from pipespec.comparison.drafting import StageSums
from pipespec.comparison.record import PromptResult, Record, Turn, save
from pipespec.config import Schedule
from pipespec.planning.system import Choice, System
from pipespec.simulate.prediction import Prediction


def simulate(
    contestants: Sequence[Contestant],
    system: System,
    inputs: Inputs,
    record: Record,
    path: Path,
    on_progress: Callable[[str], None],
) -> None:
    """One turn for each variant of each contestant, all of which are ours; they go to `record` and
    its file. system: of the very models and prompts of `inputs`.

    Raises:
        PipeSpecError: the file cannot be written.
    """
    for contestant in contestants:
        on_progress(f"simulating {contestant.key}")
        for variant in contestant.variants:
            prediction = system.predict(_choice(contestant, variant, system))
            results = _results(prediction, inputs, record)
            record.turns.append(Turn(1, contestant.key, variant.label, results))
            save(record, path)


def _choice(contestant: Contestant, variant: Variant, system: System) -> Choice:
    strategy = contestant.settings["strategy"]
    first = system.target if strategy == "greedy" else 0
    schedule = Schedule(**contestant.settings.get("schedule", {}), **variant.settings)
    return Choice(tuple(range(first, system.target + 1)), strategy, schedule)


def _results(prediction: Prediction, inputs: Inputs, record: Record) -> tuple[PromptResult, ...]:
    texts = zip(
        inputs.prompts, prediction.outputs, prediction.seconds, zip(*prediction.stages), strict=True
    )
    return tuple(
        PromptResult(
            prompt.index,
            len(output),
            seconds,
            output=record.store(output, inputs.hierarchy.tokenizer.decode(output)),
            stages=tuple(map(StageSums.of, stages)),
        )
        for prompt, output, seconds, stages in texts
    )
