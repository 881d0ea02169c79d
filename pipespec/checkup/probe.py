"""The child process that loads torch: `python -m pipespec.checkup.probe`, a job on standard input.

Answers one line a result, as it comes, so that what was measured before a failure is kept.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipespec.checkup.children import answer
from pipespec.config import ModelConfig
from pipespec.errors import PipeSpecError
from pipespec.placement import StagePlacement
from pipespec.runners.base import ModelRunner
from pipespec.worker import pin

_CONTEXT_LENGTH: Final = 512  # of every runner: room for what is timed


def main() -> int:
    question = json.load(sys.stdin)
    pin(question["cores"])
    jobs = {"memory": _memory, "shape": _shape, "runner": _runner}
    jobs[question["job"]](question)
    return 0


def _memory(question: Mapping[str, Any]) -> None:
    """What torch was built for and sees, and how fast memory is read."""
    import torch

    from pipespec.checkup.timing import large_size, read_bandwidth

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    answer(
        {
            "cuda": torch.version.cuda,
            "num_devices": devices,
            "peers": [
                [a, b]
                for a in range(devices)
                for b in range(devices)
                if a != b and torch.cuda.can_device_access_peer(a, b)
            ],
        }
    )
    torch.set_num_threads(1)
    for device in ["cpu", *(f"cuda:{index}" for index in range(devices))]:
        size = large_size(device)
        answer({"device": device, "bytes": size, "bytes_per_s": read_bandwidth(size, device)})


def _shape(question: Mapping[str, Any]) -> None:
    from pipespec.checkup.shapes import write_checkpoint

    write_checkpoint(question["name"], Path(question["folder"]))


def _runner(question: Mapping[str, Any]) -> None:
    """Times one runner in each of `dtypes` with each of `models`. A model's `text` is drawn again;
    where it is None, the first dtype writes it."""
    import torch

    from pipespec.runners.native import BuildError

    torch.set_num_threads(1)
    texts = {model["name"]: model["text"] for model in question["models"]}
    for dtype in question["dtypes"]:
        for model in question["models"]:
            try:
                result = _measure(question, dtype, model, texts)
            except (PipeSpecError, RuntimeError, ImportError, ValueError, TypeError) as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                is_missing = isinstance(error.__cause__, BuildError)
                result = {"obstacle" if is_missing else "error": reason}
            answer({"model": model["name"], "dtype": dtype, **result})


def _measure(
    question: Mapping[str, Any],
    dtype: str,
    model: Mapping[str, Any],
    texts: dict[str, list[int] | None],
) -> dict[str, Any]:
    from pipespec.checkup.timing import (
        greedy_draws,
        read_bandwidth,
        reference_text,
        step_times_s,
    )
    from pipespec.runners.determinism import LogitRunner

    start_s = time.perf_counter()
    runner = _load(question, dtype, model)
    try:
        result: dict[str, Any] = {"load_s": time.perf_counter() - start_s}
        prompt, text = model["prompt"], texts[model["name"]]
        if text is None:
            assert isinstance(runner, LogitRunner)
            text, result["margins"] = reference_text(runner, prompt, question["num_tokens"])
            texts[model["name"]] = result["text"] = text
        result["draws"] = greedy_draws(runner, prompt, text)
        result["step_s"] = step_times_s(runner, question["seconds"])
        size = model["bytes_to_read"][dtype]
        result["bytes_per_s"] = read_bandwidth(size, question["device"])
        return result
    finally:
        runner.close()


def _load(question: Mapping[str, Any], dtype: str, model: Mapping[str, Any]) -> ModelRunner:
    folder, device = Path(model["folder"]), question["device"]
    if question["runner"] == "static":
        from pipespec.checkup.static_compile import StaticCompileRunner

        return StaticCompileRunner(
            folder,
            dtype=dtype,
            device=device,
            vocab_size=model["vocab_size"],
            context_length=_CONTEXT_LENGTH,
        )
    if question["runner"] == "eager":
        from pipespec.runners.llama import LlamaRunner

        return LlamaRunner(
            folder,
            name=model["name"],
            dtype=dtype,
            device=device,
            vocab_size=model["vocab_size"],
            context_length=_CONTEXT_LENGTH,
            use_graphs=False,
        )
    from pipespec.runners.factory import load_runner

    config = ModelConfig(str(folder), (device,), dtype, runner=question["runner"])
    placement = StagePlacement(device)
    return load_runner(config, placement, folder, model["vocab_size"], _CONTEXT_LENGTH)


if __name__ == "__main__":
    status = main()
    os._exit(status)  # for the interpreter to unload torch takes a second
