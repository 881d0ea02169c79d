"""What a contestant's process is told: models, places and limits as JSON, and its variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipespec.comparison.contestants import Contestant, num_threads, seen_by_process
from pipespec.config import ModelConfig, SamplingParams, model_to_json
from pipespec.decoding import Hierarchy
from pipespec.placement import StagePlacement
from pipespec.stage_process import stage_environment


def specification(
    contestant: Contestant,
    hierarchy: Hierarchy,
    *,
    base: Path,
    sampling: SamplingParams,
    timeout_s: float,
) -> dict[str, Any]:
    """For ours: the models of the config, and a place for each that is loaded. For a peer: the
    folders of what it loads, target last, and the places as its process names them.

    base: what relative paths in the models config are relative to. timeout_s: for loading.
    """
    spec: dict[str, Any] = {
        "kind": contestant.kind,
        "settings": contestant.settings,
        "cores": contestant.cores,
        "num_positions": hierarchy.context_length,
        "sampling": asdict(sampling),
        "timeout_s": timeout_s,
    }
    places = contestant.places
    if contestant.kind == "transformers":
        places, _ = seen_by_process(places, hierarchy.machine)
        indexes = [len(hierarchy.models) - 1]
        if len(places) == 2:
            indexes.insert(0, 0)
        spec["folders"] = [str(hierarchy.folders[index]) for index in indexes]
        spec["models"] = [model_to_json(hierarchy.models[index]) for index in indexes]
        spec["eos"] = hierarchy.eos
    else:
        spec["base"] = str(base.resolve())
        spec["models"] = [model_to_json(model) for model in hierarchy.models]
    spec["places"] = [asdict(place) for place in places]
    return spec


def environment_of(
    contestant: Contestant, hierarchy: Hierarchy, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The variables of a contestant's process. Ours sees the whole machine, because a config counts
    its GPUs; everyone else sees the GPUs that it shall use."""
    place = StagePlacement(
        device="cpu",
        visible_devices=seen_by_process(contestant.places, hierarchy.machine)[1],
        threads=num_threads(contestant.places),
    )
    variables = {**inherited, **stage_environment(place, inherited)}
    if contestant.kind == "own":
        del variables["CUDA_VISIBLE_DEVICES"]
        if "CUDA_VISIBLE_DEVICES" in inherited:
            variables["CUDA_VISIBLE_DEVICES"] = inherited["CUDA_VISIBLE_DEVICES"]
    return variables


def model_of(values: Mapping[str, Any]) -> ModelConfig:
    """Of what `model_to_json` made."""
    return ModelConfig(**{**values, "devices": tuple(values["devices"])})


def place_of(values: Mapping[str, Any]) -> StagePlacement:
    """JSON knows no tuples; the sequences of a placement all are."""
    restored: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return StagePlacement(**restored)
