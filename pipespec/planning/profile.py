"""What was measured of a hierarchy on a machine, as one JSON file.

It grows part by part and is written after each, so that a measurement that was interrupted goes on
where it was. It says what it is of: models, prompts, settings of the text, machine, versions. Read
for anything else, it is refused: a plan from the wrong numbers looks like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from pipespec.config import GenerationParams, ModelConfig, config_digest
from pipespec.errors import DataError
from pipespec.placement import Machine

FORMAT: Final = 2
_NAMES: Final = {
    "models": "models config",
    "prompts": "prompts",
    "text": "settings of the text",
    "machine": "machine",
    "versions": "versions",
}
_REMEDY: Final = "remove it, or give another name, and it will be measured anew"


@dataclass(slots=True)
class Profile:
    """identity: what it is of, by `identity_of`. parts: plain JSON values by name, as `measure`
    makes them and `measured_system` reads them. measuring_s: how long they took."""

    identity: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)
    measuring_s: float = 0.0


def identity_of(
    models: Sequence[ModelConfig],
    prompts: Sequence[Sequence[int]],
    generation: GenerationParams,
    machine: Machine,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """What a profile is of. environment: of `describe_environment`."""
    versions = environment["versions"]
    return {
        "models": config_digest(models),
        "prompts": _digest([list(ids) for ids in prompts]),
        "text": {
            **asdict(generation.sampling),
            "max_new_tokens": generation.max_new_tokens,
            "stop": list(generation.stop),
        },
        "machine": {
            "cpu": environment["cpu"],
            "cores": list(machine.cores),
            "gpus_gib": [round(gib) for gib in machine.gpu_memory_gib],
        },
        "versions": {
            "pipespec": environment["pipespec_version"],
            "torch": versions["torch"],
            "transformers": versions["transformers"],
        },
    }


def read_profile(path: Path, identity: Mapping[str, Any]) -> Profile | None:
    """The profile in the file; None if there is no such file.

    Raises:
        DataError: it is no profile, or of something else; names the file, the difference and what
            to do.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"--profile: {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--profile: {path} is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(values, dict) or values.get("pipespec_profile") != FORMAT:
        raise DataError(f"--profile: {path} is not a profile of this version; {_REMEDY}")
    stored = values.get("identity")
    for key, name in _NAMES.items():
        there = stored.get(key) if isinstance(stored, dict) else None
        if there != identity[key]:
            raise DataError(
                f"--profile: {path} was measured with another {name}"
                f"{_difference(there, identity[key])}; {_REMEDY}"
            )
    if _digest(values.get("parts")) != values.get("digest"):
        raise DataError(f"--profile: {path} is damaged; {_REMEDY}")
    return Profile(values["identity"], values["parts"], values["measuring_s"])


def write_profile(path: Path, profile: Profile) -> None:
    """Replaces the file at once: a reader never sees half of it.

    Raises:
        DataError: the file cannot be written.
    """
    values = {
        "pipespec_profile": FORMAT,
        "identity": profile.identity,
        "measuring_s": round(profile.measuring_s, 2),
        "digest": _digest(profile.parts),
        "parts": profile.parts,
    }
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(values, separators=(",", ":")), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"--profile: {path}: {error.strerror or error}") from error


def _difference(there: object, now: object) -> str:
    """The first difference of two flat objects, as text; of two digests there is none to tell."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in (*now, *there):
            if there.get(key) != now.get(key):
                return f" ({key}: {there.get(key)} there, {now.get(key)} now)"
    return ""


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
