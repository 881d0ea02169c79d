"""What a run is called in tables and pictures: from its metadata alone, never from a file's name.

Works on PipeSpec's metadata and the original's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final

from pipespec.config import STRATEGIES, SamplingParams

# Told apart by everybody, and in grey by their lightness (Okabe and Ito's colours).
COLORS: Final[Mapping[str, str]] = {
    "greedy": "#7f7f7f",
    "chain": "#e69f00",
    "async-chain": "#0072b2",
}
OTHER_COLOR: Final = "#009e73"
# Of the same palette: who wrote a token. "either": a bonus or a correction, the file does not say.
TOKEN_COLORS: Final[Mapping[str, str]] = {
    "accepted": "#009e73",
    "correction": "#d55e00",
    "bonus": "#56b4e9",
    "either": "#cc79a7",
}

Metadata = Mapping[str, Any]

_SIZE: Final = re.compile(r"(?<![\w.])(?:\d+x)?\d+(?:\.\d+)?[MB](?![\w.])", re.IGNORECASE)
_CUDA: Final = re.compile(r"cuda(?::(\d+))?")


def model_names(metadata: Metadata) -> tuple[str, ...]:
    """Short names of the models that ran, first draft first. A greedy file of the original lists
    all models; the last one ran."""
    models = metadata["model_configs"]
    paths = [str(model.get("path", "?")).rstrip("/") for model in models] or ["?"]
    names = tuple(path.rsplit("/", 1)[-1] for path in paths)
    return names[-1:] if metadata["strategy"] == "greedy" else names


def short_names(all_metadata: Iterable[Metadata]) -> dict[str, str]:
    """What the models of several runs are called where there is little room: by the number of
    their parameters ("8B") if their names say it and it is no other model's, else in full."""
    names = {name for metadata in all_metadata for name in model_names(metadata)}
    sizes = {
        name: found[0].upper().replace("X", "x") for name in names if (found := _SIZE.findall(name))
    }
    known = list(sizes.values())
    return {
        name: sizes[name] if name in sizes and known.count(sizes[name]) == 1 else name
        for name in names
    }


def dataset_name(metadata: Metadata) -> str:
    """The last part of what the data set was called."""
    return str(metadata.get("dataset") or "?").rstrip("/").rsplit("/", 1)[-1]


def text_settings(metadata: Metadata) -> str:
    """What decides a text besides target and prompt, in words; of the original's files, which say
    nothing of it, nothing."""
    parts = []
    if (limit := metadata.get("max_new_tokens")) is not None:
        parts.append(f"at most {limit} new tokens")
    sampling = metadata.get("sampling")
    if isinstance(sampling, Mapping) and sampling.get("temperature"):
        usual = asdict(SamplingParams())
        parts += [
            f"{name.replace('_', '-')} {value}"
            for name, value in sampling.items()
            if value != usual.get(name)
        ]
    stop = metadata.get("stop")
    if isinstance(stop, list) and stop:
        parts.append("stop at " + " or ".join(map(repr, stop)))
    if metadata.get("generation_prompt") is False:
        parts.append("no generation prompt")
    return ", ".join(parts)


def comparison_key(metadata: Metadata) -> tuple[str, str, str]:
    """Runs are compared if these are alike: the data set, the target, and what else decides the
    text."""
    return dataset_name(metadata), model_names(metadata)[-1], text_settings(metadata)


def stage_devices(metadata: Metadata) -> tuple[tuple[int, ...], ...]:
    """Of each model that ran (`model_names`), its indexes in the lists of `gpustats`: as the
    monitor says, and in files that know of none, the GPUs that its config names. Empty where that
    is not known."""
    monitor = metadata.get("monitor")
    if isinstance(monitor, Mapping) and isinstance(monitor.get("stages"), list):
        found = tuple(_indexes(devices) for devices in monitor["stages"])
        if len(found) == len(model_names(metadata)):
            return found
    models = metadata["model_configs"]
    ran = models[-1:] if metadata["strategy"] == "greedy" else models
    return tuple(_gpus(model.get("devices")) for model in ran)


def _indexes(devices: object) -> tuple[int, ...]:
    found = devices if isinstance(devices, list) else []
    return tuple(index for index in found if isinstance(index, int) and index >= 0)


def _gpus(devices: object) -> tuple[int, ...]:
    names = devices if isinstance(devices, list) else [devices]
    found = (_CUDA.fullmatch(str(name)) for name in names)
    return tuple(int(match[1] or 0) for match in found if match)


def lookahead(metadata: Metadata) -> int:
    """As set, or as the policy's choice came out on average."""
    value = metadata.get("lookahead")
    return value if type(value) is int else 0


def lookahead_text(metadata: Metadata) -> str:
    """ "auto", a number, or "-" for greedy."""
    if metadata["strategy"] == "greedy":
        return "-"
    return "auto" if metadata.get("lookahead_mode") == "auto" else str(lookahead(metadata))


def run_order(metadata: Metadata) -> tuple[str, int, int, tuple[str, ...], int]:
    """For sorting: by data set, strategy, number of models, their names, lookahead."""
    strategy = metadata["strategy"]
    place = STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES)
    names = model_names(metadata)
    return dataset_name(metadata), place, len(names), names, lookahead(metadata)


def models_label(metadata: Metadata, names: Mapping[str, str] | None = None) -> str:
    """The models that ran, in one line. names: of `short_names`."""
    return " > ".join((names or {}).get(name, name) for name in model_names(metadata))


def run_label(
    metadata: Metadata, *, name_dataset: bool = False, names: Mapping[str, str] | None = None
) -> str:
    """One line: strategy, models and, where there is one, lookahead. names: of `short_names`."""
    parts = [str(metadata["strategy"]), models_label(metadata, names)]
    if metadata["strategy"] != "greedy":
        text = lookahead_text(metadata)
        parts.append(text if text == "auto" else f"lookahead {text}")
    if name_dataset:
        parts.append(dataset_name(metadata))
    return ", ".join(parts)


def run_color(metadata: Metadata) -> str:
    """Of the strategy."""
    return COLORS.get(metadata["strategy"], OTHER_COLOR)
