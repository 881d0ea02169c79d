"""What the file of a race says before anyone has started: machine, models, prompts, contestants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pipespec.commands.inputs import Inputs
from pipespec.commands.settings import Settings
from pipespec.comparison.contestants import Contestant, LeftOut, Places, playing_grounds
from pipespec.comparison.record import Entrant, Record
from pipespec.config import model_to_json
from pipespec.decoding import Hierarchy
from pipespec.results import describe_environment


def describe(
    settings: Settings,
    inputs: Inputs,
    contestants: Sequence[Contestant],
    left_out: Sequence[LeftOut],
    tables: Sequence[str],
    **race: Any,
) -> Record:
    """A record without turns. race: what else its metadata shall say."""
    hierarchy = inputs.hierarchy
    metadata: dict[str, Any] = {
        "started_at": now(),
        "finished_at": None,
        **race,
        **describe_environment(),
        "machine": asdict(hierarchy.machine),
        "models": [model_to_json(model) for model in settings.models],
        "models_config": str(settings.config_path),
        "emulated": any(model.emulated is not None for model in settings.models),
        "dataset": inputs.dataset.name,
        "dataset_source": inputs.dataset.source,
        "dataset_digest": inputs.dataset.digest,
        "num_samples": len(inputs.prompts),
        "num_prompt_tokens": [len(prompt.ids) for prompt in inputs.prompts],
        "generation_prompt": settings.generation_prompt,
        "prefill": settings.prefill,
        "max_new_tokens": settings.generation.max_new_tokens,
        "sampling": asdict(settings.generation.sampling),
        "tables": {
            table: _ground_title(table, places, hierarchy)
            for table, places in playing_grounds(hierarchy, tables).items()
        },
        "differences": [],
    }
    absent = [Entrant(x.name, x.name, "", (), (), (), {}, left_out=x.why) for x in left_out]
    return Record(metadata, [*map(_entrant, contestants), *absent])


def now() -> str:
    """ISO 8601, with the offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _entrant(contestant: Contestant) -> Entrant:
    return Entrant(
        contestant.key,
        contestant.name,
        contestant.kind,
        contestant.tables,
        contestant.cores,
        tuple(asdict(place) for place in contestant.places),
        contestant.settings,
        tuple(variant.label for variant in contestant.variants),
    )


def _ground_title(table: str, places: Places, hierarchy: Hierarchy) -> str:
    """One clause: who has what."""
    if all(model.emulated is not None for model in hierarchy.models):
        return "async-chain has a device a model"
    everyone = _place_text(places)
    if table == "total":
        return f"everyone has {everyone}"
    own = " + ".join(_place_text((place,)) for place in hierarchy.placements)
    return f"{everyone}; async-chain has {own}"


def _place_text(places: Places) -> str:
    """The devices of models that are in one process."""
    names = list(dict.fromkeys(name for place in places for name in place.visible_devices))
    if names:
        return f"GPU {', '.join(names)}"
    cores = sorted({core for place in places for core in place.cores})
    if cores:
        return f"core{'s' if len(cores) > 1 else ''} {', '.join(map(str, cores))}"
    threads = max(place.threads for place in places)
    return f"{threads} thread{'s' if threads > 1 else ''}, unpinned"
