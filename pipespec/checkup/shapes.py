"""Checkpoints of well-known sizes with random weights: for time, which does not depend on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pipespec.checkpoint import CheckpointShape
from pipespec.dry_run import KNOWN_CONFIGS

SHAPES: Final[Mapping[str, str]] = {
    "llama-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-8b": "meta-llama/Llama-3.1-8B-Instruct",
}
_SHARD_BYTES: Final = 2 << 30
_NUM_VALUES: Final = 1 << 20  # random ones, repeated through all tensors
_STANDARD_DEVIATION: Final = 0.02
_CONTEXT_LENGTH: Final = 4096


def shape_of(name: str) -> CheckpointShape:
    """The sizes behind one of `SHAPES`."""
    return CheckpointShape.from_config(_config(name), SHAPES[name])


def write_checkpoint(name: str, folder: Path) -> None:
    """Writes the model in bfloat16, in several files, as transformers would."""
    import torch
    from safetensors.torch import save_file

    config = _config(name)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_NUM_VALUES, generator=generator).mul_(_STANDARD_DEVIATION).bfloat16()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes = [0]
    weight_map = {}
    for number, (key, shape) in enumerate(_tensors(config)):
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:  # not a norm
            flat = tensor.view(-1)
            rolled = values.roll(7919 * number)
            whole = flat.numel() // _NUM_VALUES * _NUM_VALUES
            flat[:whole].view(-1, _NUM_VALUES).copy_(rolled.expand(whole // _NUM_VALUES, -1))
            flat[whole:] = rolled[: flat.numel() - whole]
        if sizes[-1] + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            save_file(shards[-1], folder / _file(len(shards)), metadata={"format": "pt"})
            shards[-1].clear()
            shards.append({})
            sizes.append(0)
        shards[-1][key] = tensor
        sizes[-1] += tensor.nbytes
        weight_map[key] = _file(len(shards))
    save_file(shards[-1], folder / _file(len(shards)), metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _file(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _config(name: str) -> dict[str, Any]:
    return {
        **KNOWN_CONFIGS[SHAPES[name]],
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": _CONTEXT_LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Llama checkpoint."""
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)
