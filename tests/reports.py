"""Result files for tests of the report, of PipeSpec and as the original wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODELS = [
    {"path": "meta/Small", "devices": ["cuda:0"]},
    {"path": "meta/Large", "devices": "cuda:1"},
]


def own_sample(
    index: int, strategy: str, text: str = "one two three", **more: Any
) -> dict[str, Any]:
    """Six tokens: the prefill's, two accepted and a correction, one accepted at the limit, and a
    bonus token between; of greedy, six of its own."""
    drafting: dict[str, Any] = {
        "model_times": [[0.01] * 5, [0.1, 0.1, 0.1, 0.2]],
        "accepted_tokens": [[3, 0, 1, 1]],
        "offered_tokens": [[4, 2, 0, 3]],
        "model_starts": [[0.0] * 5, [0.5, 0.6, 0.7, 0.8]],
        "num_accepted": [3],
        "num_offered": [7],
        "arrivals": [[0.4, 1], [0.6, 3], [1.0, 2]],
    }
    greedy = {"token_times": [0.2] * 5, "arrivals": [[0.2 * (n + 1), 1] for n in range(6)]}
    time_s = 1.2 if strategy == "greedy" else 1.0
    numbers = greedy if strategy == "greedy" else drafting
    return {
        "sample_index": index,
        "strategy": strategy,
        "metrics": {"total_time": time_s, "tokens_generated": 6, **numbers},
        "output_text": text,
        "input_text": f"prompt {index}",
        "gpustats": [],
        "finish_reason": "length",
        "token_lengths": [3, 4, 0, len(text) - 7, 0, 0],
        **more,
    }


def write_run(
    folder: Path, strategy: str, samples: list[dict[str, Any]], name: str = "", **metadata: Any
) -> Path:
    models = MODELS[-1:] if strategy == "greedy" else MODELS
    content = {
        "metadata": {
            "strategy": strategy, "model_configs": models, "lookahead": 0, "dataset": "set",
            "num_samples": len(samples), **metadata,
        },
        "results": samples,
    }  # fmt: skip
    path = folder / f"{name or strategy}.json"
    path.write_text(json.dumps(content))
    return path


def write_both(folder: Path, num_samples: int = 2, **more: Any) -> None:
    """A greedy and an async-chain run of the same prompts."""
    for strategy in ("greedy", "async-chain"):
        samples = [own_sample(index, strategy, **more) for index in range(num_samples)]
        write_run(folder, strategy, samples)
