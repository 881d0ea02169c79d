"""The `metadata` of a result file, and whether two runs are the same run.

The original's five keys come first and keep their meaning; what is new follows. Keys in `DEFINING`
say what was run: a stored file is the result of the command at hand if and only if they agree.
The others say where, when and by which processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from pipespec.config import GenerationParams, ModelConfig, Schedule, model_to_json

SCHEMA_VERSION: Final = 1

DEFINING: Final = (
    "schema_version",
    "strategy",
    "model_configs",
    "lookahead_mode",
    "lookahead",
    "policy",
    "run_ahead",
    "outcomes",
    "tree",
    "drop_stages",
    "runner",
    "dataset",
    "dataset_digest",
    "num_samples",
    "generation_prompt",
    "prefill",
    "max_new_tokens",
    "stop",
    "sampling",
)


def run_metadata(
    *,
    strategy: str,
    models: Sequence[ModelConfig],
    generation: GenerationParams,
    schedule: Schedule,
    dataset: str,
    dataset_source: str,
    dataset_digest: str,
    num_samples: int,
    generation_prompt: bool,
    runner: str,
    environment: Mapping[str, Any],
    started_at: str,
    drop_stages: bool = False,
    prefill: int | None = None,
) -> dict[str, Any]:
    """What is known before the run starts.

    `pids`, `effective_schedule` and `payoff` are placeholders until `ResultWriter.update_metadata`
    fills them, and so is `lookahead` (0) while the policy chooses it. Greedy has a target and no
    schedule, whatever was asked for, so that its file does not depend on either.

    Args:
        runner: what `--runner` said; each model's own is in `model_configs`.
        environment: of `describe_environment`.
        started_at: ISO 8601, with its offset from UTC.
        drop_stages: whether async-chain leaves out stages that do not pay. None where it does not:
            files from before there was a choice say nothing of it.
        prefill: what `--prefill` said; None, as in files from before there was one: whole prompts.
    """
    is_greedy = strategy == "greedy"
    metadata = {
        "strategy": strategy,
        "model_configs": [model_to_json(model) for model in (models[-1:] if is_greedy else models)],
        "lookahead": 0 if is_greedy else schedule.lookahead or 0,
        "dataset": dataset,
        "num_samples": num_samples,
        "schema_version": SCHEMA_VERSION,
        "lookahead_mode": _lookahead_mode(is_greedy, schedule),
        "policy": None if is_greedy else schedule.policy,
        "run_ahead": None if is_greedy else schedule.run_ahead,
        "outcomes": schedule.outcomes if strategy == "async-chain" else None,
        "tree": schedule.tree if strategy == "async-chain" else None,
        "drop_stages": True if drop_stages and strategy == "async-chain" else None,
        "effective_schedule": None,
        "payoff": None,
        "runner": runner,
        "dataset_source": dataset_source,
        "dataset_digest": dataset_digest,
        "generation_prompt": generation_prompt,
        "prefill": prefill,
        "max_new_tokens": generation.max_new_tokens,
        "stop": list(generation.stop),
        "sampling": asdict(generation.sampling),
        "started_at": started_at,
        "pids": [],
        **environment,
    }
    return {key: plain(value) for key, value in metadata.items()}


def metadata_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The defining keys in which two runs differ, each as text with both values.

    A chosen lookahead may come out differently each time, so its value counts only where the user
    set it.
    """
    stored, wanted = plain(stored), plain(wanted)
    differences: list[str] = []
    for key in DEFINING:
        if key == "lookahead" and stored.get("lookahead_mode") == "auto":
            continue
        if key == "model_configs":
            differences += _model_differences(stored.get(key, []), wanted.get(key, []))
        elif stored.get(key) != wanted.get(key):
            differences.append(_difference(key, stored.get(key), wanted.get(key)))
    return differences


def plain(value: Any, num_digits: int | None = None) -> Any:
    """`value` as the values that JSON has, so that it equals itself after a round trip.

    Floats are rounded to `num_digits` decimals if given; one that is not finite becomes None.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if num_digits is None else round(value, num_digits)
    if isinstance(value, Mapping):
        return {str(key): plain(item, num_digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, num_digits) for item in value]
    assert value is None or isinstance(value, bool | int | str), f"{value!r} is not a JSON value"
    return value


def _lookahead_mode(is_greedy: bool, schedule: Schedule) -> str:
    if is_greedy:
        return "none"
    return "auto" if schedule.lookahead is None else "fixed"


def _model_differences(stored: Sequence[Any], wanted: Sequence[Any]) -> list[str]:
    if len(stored) != len(wanted):
        return [_difference("number of model_configs", len(stored), len(wanted))]
    return [
        _difference(f"model_configs[{index}].{key}", old.get(key), new.get(key))
        for index, (old, new) in enumerate(zip(stored, wanted))
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _difference(key: str, stored: object, wanted: object) -> str:
    return f"{key} ({_brief(stored)} there, {_brief(wanted)} now)"


def _brief(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
