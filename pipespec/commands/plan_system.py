"""From flags to the `System` that is planned: emulated models' tables, or a measured profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipespec.commands.display import Display
from pipespec.commands.inputs import Inputs
from pipespec.commands.settings import Settings
from pipespec.config import ModelConfig
from pipespec.messages import Submit
from pipespec.planning.measure import Job, measure, num_parts
from pipespec.planning.measured import measured_system
from pipespec.planning.profile import Profile, identity_of, read_profile, write_profile
from pipespec.planning.system import System, emulated_system
from pipespec.results import describe_environment
from pipespec.runners.factory import load_runner


def is_emulated(models: Sequence[ModelConfig]) -> bool:
    """Whether none has weights."""
    return all(model.emulated is not None for model in models)


def make_system(
    settings: Settings, inputs: Inputs, profile_path: Path | None, progress: Display
) -> tuple[System, str]:
    """What the simulations know, and a line on where it is from. profile_path: what is there is not
    measured again, and what is measured is kept there.

    Raises:
        UsageError: a model that cannot be loaded, or a profile of something else.
        StageError: a process that was to be measured failed.
    """
    if is_emulated(settings.models):
        return _emulated_system(settings, inputs), "emulated models: nothing is measured"
    profile = _measured_profile(settings, inputs, profile_path, progress)
    eos = inputs.hierarchy.eos
    system = measured_system(profile, settings.models, settings.generation, eos)
    kept = "" if profile_path is None else f", kept in {profile_path}"
    return system, f"measured in {profile.measuring_s:.1f} s{kept}"


def _emulated_system(settings: Settings, inputs: Inputs) -> System:
    hierarchy = inputs.hierarchy
    rows = []
    for model, placement in zip(settings.models, hierarchy.placements, strict=True):
        runner = load_runner(model, placement, None, hierarchy.vocab_size)
        rows.append(runner.info.num_tail_rows)
        runner.close()
    generation = settings.generation
    submits = [
        Submit(
            number,
            prompt.ids,
            (),
            generation.sampling,
            min(generation.max_new_tokens, hierarchy.context_length + 1 - len(prompt.ids)),
            (),
            (),
        )
        for number, prompt in enumerate(inputs.prompts)
    ]
    return emulated_system(settings.models, rows, submits, hierarchy.vocab_size)


def _measured_profile(
    settings: Settings, inputs: Inputs, path: Path | None, progress: Display
) -> Profile:
    """Read, measured as far as it lacks something, and kept."""
    hierarchy = inputs.hierarchy
    identity = identity_of(
        settings.models,
        [prompt.ids for prompt in inputs.prompts],
        settings.generation,
        hierarchy.machine,
        describe_environment(),
    )
    stored = None if path is None else read_profile(path, identity)
    profile = stored or Profile(identity, hierarchy.vocab_size)
    job = Job(
        hierarchy,
        tuple((prompt.index, prompt.ids) for prompt in inputs.prompts),
        settings.generation,
        settings.transport,
        settings.ready_timeout_s,
    )

    def keep(profile: Profile) -> None:
        if path is not None:
            write_profile(path, profile)

    total = num_parts(job, profile)
    if total:
        keep(profile)  # a path that cannot be written is said before anything is measured
        with progress.parts("measured", total) as on_part:
            measure(job, profile, keep, on_part)
    return profile
