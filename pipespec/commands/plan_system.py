"""From flags to the `System` that is planned: emulated models' tables, or a measured profile."""

from __future__ import annotations

from pathlib import Path

from pipespec.commands.display import Display
from pipespec.commands.inputs import Inputs
from pipespec.commands.settings import Settings
from pipespec.messages import Submit
from pipespec.planning.measure import Job, measure
from pipespec.planning.measured import measured_system, overheads_of
from pipespec.planning.profile import Profile, identity_of, read_profile, write_profile
from pipespec.planning.system import Overheads, System, emulated_system, is_emulated
from pipespec.results import describe_environment


def make_system(
    settings: Settings, inputs: Inputs, profile_path: Path | None, progress: Display
) -> tuple[System, str]:
    """What the simulations know, and a line on where it is from. profile_path: what is there is not
    measured again, and what is measured is kept there.

    Raises:
        UsageError: a model that cannot be loaded, or a profile of something else.
        StageError: a process that was to be measured failed.
    """
    hierarchy, generation = inputs.hierarchy, settings.generation
    profile = _measured_profile(settings, inputs, profile_path, progress)
    kept = "" if profile_path is None else f", kept in {profile_path}"
    if not is_emulated(settings.models):
        system = measured_system(
            profile, settings.models, generation, hierarchy.vocab_size, hierarchy.eos
        )
        return system, f"measured in {profile.measuring_s:.1f} s{kept}"
    system = emulated(settings, inputs, overheads_of(profile.parts))
    return system, f"emulated models; what runs add measured in {profile.measuring_s:.1f} s{kept}"


def emulated(settings: Settings, inputs: Inputs, overheads: Overheads | None = None) -> System:
    """Of emulated models, for the prompts given. overheads: what runs add; only an assumed time
    between processes without it, so that a simulation is the same on every machine."""
    hierarchy, generation = inputs.hierarchy, settings.generation
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
    return emulated_system(settings.models, submits, hierarchy.vocab_size, overheads)


def _measured_profile(
    settings: Settings, inputs: Inputs, path: Path | None, progress: Display
) -> Profile:
    """Read, measured as far as it lacks something, and kept."""
    prompts = tuple(prompt.ids for prompt in inputs.prompts)
    machine, environment = inputs.hierarchy.machine, describe_environment()
    identity = identity_of(settings.models, prompts, settings.generation, machine, environment)
    stored = None if path is None else read_profile(path, identity)
    profile = stored or Profile(identity)
    job = Job(
        inputs.hierarchy,
        prompts,
        settings.generation,
        settings.transport,
        settings.ready_timeout_s,
    )

    def keep(profile: Profile) -> None:
        if path is not None:
            write_profile(path, profile)

    num_missing = sum(name not in profile.parts for name in job.part_names())
    if num_missing:
        keep(profile)  # a path that cannot be written is said before anything is measured
        with progress.parts("measured", num_missing) as on_part:
            measure(job, profile, keep, on_part)
    return profile
