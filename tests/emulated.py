"""Models configs of emulated models: whole commands with real processes, but no weights.

Their tokenizer has one id a byte, so a prompt has as many tokens as ASCII characters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {1: ("target",), 2: ("draft", "target"), 3: ("draft", "middle", "target")}


def write_emulated(
    folder: Path,
    num_models: int = 2,
    *,
    target_ms: float = 1.0,
    agreement: float = 0.8,
    **target: Any,
) -> str:
    """Writes `emulated.json` and returns its path. Drafts are four times as fast as what follows
    them and agree with the target so often; `target` goes into its "emulated" object."""
    models: list[dict[str, Any]] = []
    for place, name in enumerate(NAMES[num_models]):
        behaviour: dict[str, Any] = {"step_ms": {"1": target_ms / 4 ** (num_models - 1 - place)}}
        behaviour |= target if name == "target" else {"agreement": agreement}
        models.append({"path": f"emulated/{name}", "devices": "cpu", "emulated": behaviour})
    path = folder / "emulated.json"
    path.write_text(json.dumps(models))
    return str(path)


def write_prompts(folder: Path, texts: Sequence[str]) -> str:
    """Writes `prompts.jsonl` and returns its path."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)
