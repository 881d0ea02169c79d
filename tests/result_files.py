"""Small result files with known numbers, in PipeSpec's schema and in the original's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODELS = ("org/small", "org/middle", "org/large")


def metadata(strategy: str, models: Sequence[str], lookahead: int = 0, **more: Any) -> Any:
    """The original's keys; GPU i holds model i."""
    configs = [{"path": path, "devices": [f"cuda:{i}"]} for i, path in enumerate(models)]
    return {
        "strategy": strategy, "model_configs": configs, "lookahead": lookahead,
        "dataset": "datasets/humaneval", "num_samples": 0, **more,
    }  # fmt: skip


def sample(
    index: int,
    seconds: float,
    num_tokens: int,
    accepted: Sequence[Sequence[int]] = (),
    *,
    powers_w: Sequence[float] = (),
    prompt: str = "",
    text: str = "text",
    **metrics: Any,
) -> dict[str, Any]:
    """An item of `results` in the original's schema; `metrics` adds keys of ours. accepted: of each
    pair, tokens by verification; empty for greedy."""
    lists: dict[str, Any] = {"token_times": [seconds / num_tokens] * (num_tokens - 1)}
    if accepted:
        times = [[0.1] * len(accepted[-1])] * (len(accepted) + 1)
        lists = {"model_times": times, "accepted_tokens": accepted}
    monitor = {"timestamp": 0.1, "gpu_utilizations": [50] * len(powers_w), "gpu_powers": powers_w}
    return {
        "sample_index": index,
        "strategy": "chain" if accepted else "greedy",
        "metrics": {**lists, "total_time": seconds, "tokens_generated": num_tokens, **metrics},
        "output_text": text,
        "input_text": prompt or f"prompt {index}",
        "gpustats": [monitor] if powers_w else [],
    }


def write_run(
    path: Path, run_metadata: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> Path:
    """The file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"metadata": {**run_metadata, "num_samples": len(results)}, "results": results}
    path.write_text(json.dumps(content))
    return path
