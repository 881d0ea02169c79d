"""What a checkpoint's `config.json` says about a Llama-shaped model, or why it is not one.

The shape: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Llama, Qwen2 (biases on q, k
and v), Qwen3 (norms on q and k) and Mistral (a sliding window) have it. The reader is strict: what
it does not know for certain raises `UnsupportedCheckpoint`, and the factory falls back on the `hf`
runner. It reads JSON only and knows neither torch nor weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipespec.errors import ModelLoadError

_CLASSES: Final = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
_QWEN = ("qwen2", "qwen3")


class UnsupportedCheckpoint(ModelLoadError):
    """A checkpoint that the lean runner cannot serve exactly; the `hf` runner may."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. factor: None, or by how much llama3's scaling stretches the wavelengths
    above `original_length / low_freq`; those below `original_length / high_freq` stay."""

    theta: float
    factor: float | None = None
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that define the forward pass. windows: for each layer, how many positions a
    token sees (itself included), None for all before it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    context_length: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]


def read_architecture(folder: Path) -> Architecture:
    """Reads `folder`/config.json.

    Raises:
        UnsupportedCheckpoint: another model type, a variant of one of the four that needs other
            arithmetic, or quantized weights.
        ModelLoadError: no such file, or not JSON.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not readable as a model's config: {error}") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    try:
        return _parse(config)
    except UnsupportedCheckpoint as error:
        raise UnsupportedCheckpoint(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UnsupportedCheckpoint(f"{path}: {detail}") from error


def _parse(config: Mapping[str, Any]) -> Architecture:
    kind = str(config.get("model_type"))
    _demand(kind in _CLASSES, f"model_type {kind!r} is not served by the lean runner")
    classes = config.get("architectures") or [_CLASSES[kind]]
    _demand(classes == [_CLASSES[kind]], f"architectures {classes} is not {_CLASSES[kind]}")
    for key in ("quantization_config", "auto_map"):
        _demand(not config.get(key), f"{key} needs another runner")
    activation = config.get("hidden_act", "silu")
    _demand(activation == "silu", f"hidden_act {activation!r} is not silu")
    hidden_size, num_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    num_layers = int(config["num_hidden_layers"])
    # Only Llama's is old enough to have checkpoints without the key; they have no grouping.
    _demand(kind == "llama" or "num_key_value_heads" in config, "no 'num_key_value_heads'")
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    default_dim = 128 if kind == "qwen3" else hidden_size // num_heads
    head_dim = int(config.get("head_dim") or default_dim)
    _demand(num_heads % num_kv_heads == 0, "key-value heads do not divide the attention heads")
    _demand(head_dim % 2 == 0, f"head_dim {head_dim} is odd")
    context_length = int(config["max_position_embeddings"])
    biased = bool(config.get("attention_bias", False)) and kind in ("llama", "qwen3")
    return Architecture(
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, context_length),
        context_length=context_length,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased,
        mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
        windows=_windows(config, kind, num_layers),
    )


def _rope(config: Mapping[str, Any], context_length: int) -> Rope:
    """Understands `rope_parameters` and the older `rope_theta` with `rope_scaling`."""
    values = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    _demand(
        not any(isinstance(value, dict) for value in values.values()),
        "rotary positions that differ between layers are not served by the lean runner",
    )
    theta = float(values.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    rotated = values.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    _demand(rotated == 1.0, f"partial_rotary_factor {rotated} is not 1")
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    _demand(kind == "llama3", f"rope type {kind!r} is not served by the lean runner")
    original = config.get("original_max_position_embeddings")
    return Rope(
        theta,
        float(values["factor"]),
        float(values["low_freq_factor"]),
        float(values["high_freq_factor"]),
        int(original or values.get("original_max_position_embeddings") or context_length),
    )


def _windows(config: Mapping[str, Any], kind: str, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", 4096 if kind in ("mistral", *_QWEN) else None)
    if kind == "llama" or (kind in _QWEN and not config.get("use_sliding_window", False)):
        window = None
    if window is not None:
        window = int(window)
        _demand(window > 0, f"sliding_window {window} is not positive")
    if kind not in _QWEN:
        _demand(not config.get("layer_types"), "layer_types need another runner")
        return (window,) * num_layers
    types = config.get("layer_types")
    if types is None:
        first = int(config.get("max_window_layers", 28))
        return tuple(window if layer >= first else None for layer in range(num_layers))
    _demand(len(types) == num_layers, "layer_types does not name every layer")
    known = ("full_attention", "sliding_attention")
    _demand(all(item in known for item in types), f"layer_types {sorted(set(types))} is unknown")
    _demand(window is not None or "sliding_attention" not in types, "sliding_window is missing")
    return tuple(window if item == "sliding_attention" else None for item in types)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnsupportedCheckpoint(otherwise)
