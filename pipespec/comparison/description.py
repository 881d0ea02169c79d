"""What the file of a race says before anyone has started: machine, models, prompts, contestants."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final

from pipespec.commands.inputs import Inputs
from pipespec.commands.settings import Settings
from pipespec.comparison.contestants import Contestant, LeftOut, Places, playing_grounds
from pipespec.comparison.record import Entrant, Record
from pipespec.config import model_to_json
from pipespec.decoding import Hierarchy
from pipespec.results import describe_environment

_HEADLINE: Final = (
    "all generated tokens by all seconds from each request to its last token, prefill included; "
    "one prompt at a time"
)


def describe(
    settings: Settings,
    inputs: Inputs,
    contestants: Sequence[Contestant],
    left_out: Sequence[LeftOut],
    *,
    tables: Sequence[str],
    rounds: int,
    one_at_a_time: bool,
    most_foreign_cores: float | None,
    command: Sequence[str],
) -> Record:
    """A record without turns."""
    generation, hierarchy = settings.generation, inputs.hierarchy
    grounds = playing_grounds(hierarchy, tables)
    metadata: dict[str, Any] = {
        "started_at": now(),
        "finished_at": None,
        "command": list(command),
        **describe_environment(),
        "machine": asdict(hierarchy.machine),
        "load_average_before": os.getloadavg(),
        "models": [model_to_json(model) for model in settings.models],
        "models_config": str(settings.config_path),
        "emulated": any(model.emulated is not None for model in settings.models),
        "dataset": inputs.dataset.name,
        "dataset_source": inputs.dataset.source,
        "dataset_digest": inputs.dataset.digest,
        "num_samples": len(inputs.prompts),
        "num_prompt_tokens": [len(prompt.ids) for prompt in inputs.prompts],
        "generation_prompt": settings.generation_prompt,
        "max_new_tokens": generation.max_new_tokens,
        "sampling": asdict(generation.sampling),
        "rounds": rounds,
        "one_at_a_time": one_at_a_time,
        "most_foreign_cores": most_foreign_cores,
        "tokens_per_s": _HEADLINE,
        "tables": {
            table: _ground_title(table, places, hierarchy) for table, places in grounds.items()
        },
        "differences": [],
    }
    entrants = [
        Entrant(
            c.key,
            c.name,
            c.kind,
            c.tables,
            _hardware(c),
            {**c.settings},
            tuple(variant.label for variant in c.variants),
        )
        for c in contestants
    ]
    entrants += [Entrant(x.name, x.name, "", (), {}, {}, left_out=x.why) for x in left_out]
    return Record(metadata, entrants)


def now() -> str:
    """ISO 8601, with the offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


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


def _hardware(contestant: Contestant) -> Mapping[str, Any]:
    return {
        "cores": contestant.cores,
        "places": [asdict(place) for place in contestant.places],
    }
