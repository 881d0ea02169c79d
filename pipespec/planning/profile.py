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
from pipespec.planning.system import Overheads
from pipespec.planning.times import MeasuredTimes, Points
from pipespec.planning.trace import Branch, Draws, Ranked, Text

FORMAT: Final = 1
NUM_RANKED: Final = 5  # choices recorded at each position, where the runner ranks
_KEYS: Final = {
    "models": "models config",
    "prompts": "prompts",
    "text": "settings of the text",
    "machine": "machine",
    "versions": "versions",
}


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """Facts of one model and its step times. chain_times: in the target's process, where the cores
    differ. load_s: from nothing to ready, files in the cache or not."""

    name: str
    runner: str
    device: str
    num_parameters: int
    context_length: int
    num_tail_rows: int
    load_s: float
    times: MeasuredTimes
    chain_times: MeasuredTimes | None = None


@dataclass(slots=True)
class Profile:
    """identity: what it is of, by `identity_of`. vocab_size: ids that may be drawn. models, draws:
    by index, in the hierarchy's order. branches: of each model but the first and the target.
    slow_downs[i, j]: how many times as long a forward of model i takes while model j computes.
    measuring_s: how long all that took."""

    identity: dict[str, Any]
    vocab_size: int
    models: dict[int, MeasuredModel] = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    branches: dict[int, list[Branch]] = field(default_factory=dict)
    draws: dict[int, Draws] = field(default_factory=dict)
    slow_downs: dict[tuple[int, int], float] = field(default_factory=dict)
    overheads: Overheads | None = None
    measuring_s: float = 0.0

    def all_branches(self) -> list[Branch]:
        """Of all models, larger ones first, in the order of `Draws.on_branches`."""
        return [
            branch
            for index in sorted(self.branches, reverse=True)
            for branch in self.branches[index]
        ]

    def branches_above(self, index: int) -> list[Branch]:
        """Those of models larger than this one: the first ones of `all_branches`."""
        return [
            branch
            for larger in sorted(self.branches, reverse=True)
            if larger > index
            for branch in self.branches[larger]
        ]


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
        "prompts": hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest(),
        "text": {**asdict(generation.sampling), "max_new_tokens": generation.max_new_tokens}
        | {"stop": list(generation.stop)},
        "machine": {
            "cpu": environment["cpu"],
            "cores": list(machine.cores),
            "gpus_gib": [round(gib) for gib in machine.gpu_memory_gib],
        },
        "versions": {
            "pipespec": environment["pipespec_version"],
            **{name: versions[name] for name in ("torch", "transformers")},
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
    for key, name in _KEYS.items():
        there = stored.get(key) if isinstance(stored, dict) else None
        if there != identity[key]:
            what = f" ({_differences(there, identity[key])})" if key not in _DIGESTS else ""
            raise DataError(f"--profile: {path} was measured with another {name}{what}; {_REMEDY}")
    try:
        return _from_json(values)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"--profile: {path} is damaged ({error!r}); {_REMEDY}") from error


def write_profile(path: Path, profile: Profile) -> None:
    """Replaces the file at once: a reader never sees half of it.

    Raises:
        DataError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(_to_json(profile), separators=(",", ":")), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"--profile: {path}: {error.strerror or error}") from error


_REMEDY: Final = "remove it, or give another name, and it will be measured anew"
_DIGESTS: Final = ("models", "prompts")


def _differences(there: object, now: object) -> str:
    """The first difference of two flat objects, as text."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in (*now, *there):
            if there.get(key) != now.get(key):
                return f"{key}: {there.get(key)} there, {now.get(key)} now"
    return "none there"


def _to_json(profile: Profile) -> dict[str, Any]:
    overheads = profile.overheads
    return {
        "pipespec_profile": FORMAT,
        "identity": profile.identity,
        "vocab_size": profile.vocab_size,
        "measuring_s": round(profile.measuring_s, 2),
        "overheads": None if overheads is None else asdict(overheads),
        "slow_downs": [[i, j, factor] for (i, j), factor in profile.slow_downs.items()],
        "models": {str(index): asdict(model) for index, model in profile.models.items()},
        "texts": [asdict(text) for text in profile.texts],
        "branches": {
            str(index): [asdict(branch) for branch in branches]
            for index, branches in profile.branches.items()
        },
        "draws": {str(index): asdict(draws) for index, draws in profile.draws.items()},
    }


def _from_json(values: Mapping[str, Any]) -> Profile:
    overheads = values["overheads"]
    return Profile(
        identity=values["identity"],
        vocab_size=int(values["vocab_size"]),
        measuring_s=float(values["measuring_s"]),
        overheads=None if overheads is None else Overheads(**overheads),
        slow_downs={(int(i), int(j)): float(factor) for i, j, factor in values["slow_downs"]},
        models={int(index): _model(item) for index, item in values["models"].items()},
        texts=[
            Text(item["index"], tuple(item["prompt"]), tuple(item["tokens"]))
            for item in values["texts"]
        ],
        branches={
            int(index): [
                Branch(item["text"], item["offset"], tuple(item["tokens"])) for item in items
            ]
            for index, items in values["branches"].items()
        },
        draws={
            int(index): Draws(_ranked(item["on_texts"]), _ranked(item["on_branches"]))
            for index, item in values["draws"].items()
        },
    )


def _model(item: Mapping[str, Any]) -> MeasuredModel:
    times, chain_times = item["times"], item["chain_times"]
    return MeasuredModel(
        **{
            **item,
            "times": _times(times),
            "chain_times": None if chain_times is None else _times(chain_times),
        }
    )


def _times(item: Mapping[str, Any]) -> MeasuredTimes:
    return MeasuredTimes(_table(item["decode"]), _points(item["prefill"]), _table(item["trees"]))


def _table(rows: Sequence[Any]) -> tuple[tuple[int, Points], ...]:
    return tuple((int(context), _points(points)) for context, points in rows)


def _points(pairs: Sequence[Any]) -> Points:
    return tuple((int(count), float(ms)) for count, ms in pairs)


def _ranked(items: Sequence[Any]) -> tuple[tuple[Ranked, ...], ...]:
    return tuple(tuple(tuple(map(int, ranked)) for ranked in item) for item in items)
