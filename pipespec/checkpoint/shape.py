"""What a model needs, read from the small files of its folder: sizes, parameters, end tokens.

Parameters of Llama, Mistral, Qwen2 and Qwen3 follow exactly from config.json; other types are
estimated as if they were Llama. Where safetensors files are present their headers decide, for any
type. Knows nothing of devices or of what a runner allocates besides weights and KV cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pipespec.errors import ModelLoadError

DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
# bitsandbytes: one byte a weight and a float32 a row; half a byte and a float32 a block of 64.
_QUANTIZED_BYTES: Final[Mapping[str, float]] = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
_EXACT_TYPES: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_DEFAULT_CONTEXT: Final = 2048  # for types that do not write down a limit
_MAX_HEADER_BYTES: Final = 100 << 20
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_NOT_QUANTIZED: Final = ("embed", "lm_head", "wte", "wpe", "norm")


@dataclass(frozen=True, slots=True)
class CheckpointShape:
    """The sizes of a model.

    num_quantizable: of the parameters, those in linear layers that quantization shrinks (not
    embeddings, norms and the output head). is_exact: the counts follow from a known architecture
    or from the weights' headers; else they are an estimate. source: where the sizes come from.
    stored_bytes: of the weights on disk, where they are already quantized there; else None.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tied_embeddings: bool
    num_parameters: int
    num_quantizable: int
    is_exact: bool
    source: str
    stored_bytes: int | None = None

    @classmethod
    def read(cls, folder: Path) -> CheckpointShape:
        """The shape of the model in a folder, from config.json and the headers of its weights.

        Raises:
            ModelLoadError: config.json is missing, unreadable, or lacks a size.
        """
        config = _read_json(folder / "config.json")
        if not config:
            raise ModelLoadError(f"{folder} has no readable config.json; it is not a model folder")
        shape = cls.from_config(config, f"{folder}/config.json")
        return _with_headers(shape, folder, "quantization_config" in config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> CheckpointShape:
        """The shape that the contents of a config.json describe; `source` names it in errors.

        Raises:
            ModelLoadError: a size is missing or no positive integer.
        """
        text = config.get("text_config")
        reader = _Reader({**config, **text} if isinstance(text, Mapping) else config, source)
        hidden = reader.size("hidden_size", "n_embd", "d_model")
        num_heads = reader.size("num_attention_heads", "n_head", "num_heads")
        model_type = str(config.get("model_type", "unknown"))
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else ""
        tied_default = model_type not in _EXACT_TYPES and "text_config" not in config
        shape = cls(
            architecture=str(first or model_type),
            num_layers=reader.size("num_hidden_layers", "n_layer", "num_layers"),
            hidden_size=hidden,
            num_heads=num_heads,
            num_kv_heads=reader.size("num_key_value_heads", default=num_heads),
            head_dim=reader.size("head_dim", default=max(1, hidden // num_heads)),
            vocab_size=reader.size("vocab_size"),
            context_length=reader.size(
                "max_position_embeddings", "n_positions", "seq_length", default=_DEFAULT_CONTEXT
            ),
            tied_embeddings=bool(reader.values.get("tie_word_embeddings", tied_default)),
            num_parameters=0,
            num_quantizable=0,
            is_exact=model_type in _EXACT_TYPES,
            source=source,
        )
        linear, rest = _count_parameters(shape, model_type, reader)
        return replace(shape, num_parameters=linear + rest, num_quantizable=linear)

    def weight_bytes(self, dtype: str, quantize: str | None = None) -> int:
        """Bytes of the weights once loaded; `dtype` and `quantize` as in a models config."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        if quantize is None:
            return self.num_parameters * DTYPE_BYTES[dtype]
        kept = (self.num_parameters - self.num_quantizable) * DTYPE_BYTES[dtype]
        return kept + math.ceil(self.num_quantizable * _QUANTIZED_BYTES[quantize])

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one position of one sequence takes in the KV cache of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, else config.json's; they may be none."""
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        text = config.get("text_config")
        for values in (config, text if isinstance(text, Mapping) else {}):
            found = values.get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            ids = [token for token in ids if type(token) is int and token >= 0]
            if ids:
                return tuple(dict.fromkeys(ids))
    return ()


@dataclass(frozen=True, slots=True)
class _Reader:
    """Sizes under the names that different model types give them."""

    values: Mapping[str, Any]
    source: str

    def size(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if type(value) is not int or value < 1:
                raise ModelLoadError(
                    f'{self.source}: "{name}" is {value!r}, not a positive integer'
                )
            return value
        if default is None:
            raise ModelLoadError(f'{self.source} lacks "{names[0]}"; it is not a language model\'s')
        return default


def _count_parameters(shape: CheckpointShape, model_type: str, reader: _Reader) -> tuple[int, int]:
    """Parameters inside linear layers of the decoder blocks, and all others."""
    hidden, flags = shape.hidden_size, reader.values
    queries = shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    inner = reader.size("intermediate_size", "n_inner", default=4 * hidden)
    num_experts = reader.size("num_experts", "num_local_experts", default=1)
    expert = reader.size("moe_intermediate_size", default=inner) if num_experts > 1 else inner
    linear = 2 * hidden * (queries + keys) + 3 * hidden * expert * num_experts
    linear += hidden * num_experts if num_experts > 1 else 0
    others = 2 * hidden
    if model_type == "qwen2":
        others += queries + 2 * keys
    elif flags.get("attention_bias"):
        others += queries + 2 * keys + hidden
    if model_type == "llama" and flags.get("mlp_bias"):
        others += 2 * inner + hidden
    if model_type == "qwen3":
        others += 2 * shape.head_dim
    embeddings = shape.vocab_size * hidden * (1 if shape.tied_embeddings else 2)
    return shape.num_layers * linear, shape.num_layers * others + embeddings + hidden


def _with_headers(shape: CheckpointShape, folder: Path, prequantized: bool) -> CheckpointShape:
    """The shape with the counts of the safetensors files, if they are all there."""
    files = _weight_files(folder)
    if not files:
        return shape
    total, quantizable = 0, 0
    try:
        for name, kind, dims in (entry for file in files for entry in _tensors(file)):
            if kind not in _FLOATS or name.endswith(("inv_freq", ".attn.bias")):
                continue  # buffers, not parameters
            if shape.tied_embeddings and name.endswith("lm_head.weight"):
                continue  # stored twice, loaded once
            count = math.prod(dims)
            total += count
            if len(dims) > 1 and not any(part in name for part in _NOT_QUANTIZED):
                quantizable += count
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{folder}: its safetensors files are damaged ({error})") from error
    if prequantized:
        return replace(shape, stored_bytes=sum(file.stat().st_size for file in files))
    return replace(
        shape, num_parameters=total, num_quantizable=quantizable, is_exact=True, source=str(folder)
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, none if one is missing."""
    index = _read_json(folder / "model.safetensors.index.json")
    weight_map = index.get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, Mapping) else {"model.safetensors"}
    files = [folder / str(name) for name in sorted(names)]
    return files if all(file.is_file() for file in files) else []


def _tensors(file: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, safetensors dtype and shape of every tensor in a file, from its header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} has no header")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry["dtype"], entry["shape"]


def _read_json(path: Path) -> Mapping[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
