"""Which runner serves a model, and one-line errors for what goes wrong while it loads.

"runner": "auto" takes for a checkpoint that they serve exactly, on one device and unquantized, the
native runner on CPU (if there is a C++ compiler and the dtype is float32 or bfloat16), else the
lean one, and transformers otherwise. Torch is imported only for real models, transformers only by
the `hf` runner.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from pipespec.config import ModelConfig
from pipespec.errors import ModelLoadError
from pipespec.placement import StagePlacement
from pipespec.runners.base import ModelRunner

log = logging.getLogger(__name__)

_LEAN: Final = ("native", "llama")  # in the order that "auto" tries


def load_runner(
    model: ModelConfig,
    placement: StagePlacement,
    folder: Path | None,
    vocab_size: int,
    context_length: int | None = None,
    num_slots: int = 1,
) -> ModelRunner:
    """Loads `model` where `placement` says.

    folder: its checkpoint; None for an emulated model. vocab_size: how many ids the tokenizer
    knows; none from there on is drawn. context_length: positions a slot must hold, None for the
    checkpoint's. num_slots: requests held at a time.

    Raises:
        ModelLoadError: weights or device that are missing or do not fit, naming the model.
        ConfigError: an "emulated" object that is wrong.
    """
    if model.emulated is not None:
        from pipespec.runners.emulated import EmulatedRunner

        return EmulatedRunner(
            model.emulated, name=model.name, vocab_size=vocab_size, context_length=context_length
        )
    assert folder is not None, "a model that is not emulated has a folder"
    if placement.device != "cpu":
        _require_cuda(model, placement)
    from pipespec.runners.memory import out_of_memory_as

    message = (
        f"{model.name} does not fit on {placement.device} in {model.dtype}; use a smaller model, "
        '"quantize", or more devices'
    )
    with out_of_memory_as(ModelLoadError, message):
        return _load(model, placement, folder, vocab_size, context_length, num_slots)


def _load(
    model: ModelConfig,
    placement: StagePlacement,
    folder: Path,
    vocab_size: int,
    context_length: int | None,
    num_slots: int,
) -> ModelRunner:
    from pipespec.runners.architecture import UnsupportedCheckpoint
    from pipespec.runners.native import BuildError

    options: dict[str, Any] = {
        "name": model.name,
        "dtype": model.dtype,
        "vocab_size": vocab_size,
        "context_length": context_length,
        "num_slots": num_slots,
        "num_threads": placement.threads,
    }
    for runner in _LEAN:
        is_asked = model.runner == runner
        obstacle = _obstacle(runner, model, placement)
        if is_asked and obstacle:
            raise ModelLoadError(f'{model.name}: "runner": "{runner}" cannot do {obstacle}')
        if obstacle or not (is_asked or model.runner == "auto"):
            continue
        try:
            return _load_lean(runner, folder, placement.device, options)
        except BuildError as error:
            if is_asked:
                raise ModelLoadError(f'{model.name}: {error}; or "runner": "llama"') from error
            log.info("%s: the llama runner serves it: %s", model.name, error)
        except UnsupportedCheckpoint as error:
            if is_asked:
                raise ModelLoadError(f'{model.name}: {error}; use "runner": "hf"') from error
            log.info("%s: the %s runner does not serve it: %s", model.name, runner, error)
    from pipespec.runners.hf import HfRunner

    return HfRunner(
        folder,
        name=model.name,
        dtype=model.dtype,
        device=placement.device,
        vocab_size=vocab_size,
        context_length=context_length,
        quantize=model.quantize,
        max_memory_gib=placement.max_memory_gib,
    )


def _load_lean(runner: str, folder: Path, device: str, options: dict[str, Any]) -> ModelRunner:
    """One of `_LEAN`. options: what all of them take."""
    if runner == "native":
        from pipespec.runners.native import NativeRunner

        return NativeRunner(folder, **options)
    from pipespec.runners.llama import LlamaRunner

    return LlamaRunner(folder, device=device, **options)


def _obstacle(runner: str, model: ModelConfig, placement: StagePlacement) -> str:
    """What one of `_LEAN` cannot do of what is asked, and what can."""
    if model.quantize is not None:
        return f'"quantize": "{model.quantize}"; use "hf"'
    if placement.device == "auto":
        return 'several devices; use "hf"'
    if runner == "native" and placement.device != "cpu":
        return f'{placement.device}; use "llama"'
    if runner == "native" and model.dtype == "float16":
        return '"dtype": "float16"; use "llama"'
    return ""


def _require_cuda(model: ModelConfig, placement: StagePlacement) -> None:
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if placement.device == "auto":
        needed = len(placement.visible_devices)
    else:
        needed = int(placement.device.partition(":")[2] or 0) + 1
    if visible < needed:
        raise ModelLoadError(
            f"{model.name} is to run on {placement.device}, but torch sees "
            f"{visible or 'no'} CUDA device{'' if visible == 1 else 's'} here; "
            'change "devices" in the models config or install a CUDA build of torch'
        )
