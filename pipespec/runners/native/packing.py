"""A checkpoint's tensors in the form that the native step computes with.

Weights [out, in] become panels of 32 outputs: [out / 32, in, 32] in float32, and in bfloat16
[out / 32, in / 2, 32, 2] with the inputs padded to a multiple of 32. Padding is zero. Knows no
request; what the numbers mean is said in `products.h` and `step.cpp`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from pipespec.runners.architecture import Architecture
from pipespec.runners.native import library
from pipespec.runners.weights import Checkpoint, open_checkpoint

PANEL: Final = 32


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights. `tensors` owns the memory that the structures point to."""

    embedding: Tensor
    head: library.Linear
    layers: ctypes.Array[library.Layer]
    norm: Tensor
    num_parameters: int
    weight_bytes: int
    tensors: tuple[Tensor, ...]


def load_weights(folder: Path, arch: Architecture, dtype: torch.dtype, vocab_size: int) -> Weights:
    """Reads and packs the checkpoint; the head gets `vocab_size` rows.

    Raises:
        UnsupportedCheckpoint: no safetensors in the folder.
        ModelLoadError: a file that is missing or damaged.
    """
    with open_checkpoint(folder) as checkpoint:
        packer = _Packer(checkpoint, arch, dtype)
        embedding, head = packer.embedding_and_head(vocab_size)
        layers = (library.Layer * arch.num_layers)(
            *(packer.layer(index) for index in range(arch.num_layers))
        )
        norm = packer.norm("model.norm.weight", arch.hidden_size)
    return Weights(
        embedding,
        head,
        layers,
        norm,
        packer.num_parameters,
        sum(tensor.nbytes for tensor in packer.tensors),
        tuple(packer.tensors),
    )


def padded(count: int, to: int = PANEL) -> int:
    return -(-count // to) * to


class _Packer:
    def __init__(self, checkpoint: Checkpoint, arch: Architecture, dtype: torch.dtype) -> None:
        self._checkpoint, self._arch, self._dtype = checkpoint, arch, dtype
        self.num_parameters = 0
        self.tensors: list[Tensor] = []

    def embedding_and_head(self, vocab_size: int) -> tuple[Tensor, library.Linear]:
        """A checkpoint that has a head of its own uses it, whatever the config says of tying."""
        shape = (self._arch.vocab_size, self._arch.hidden_size)
        embedding = self._read("model.embed_tokens.weight", *shape).contiguous()
        self.tensors.append(embedding)
        weight = embedding
        if "lm_head.weight" in self._checkpoint or not self._arch.tied_embeddings:
            weight = self._read("lm_head.weight", *shape)
        return embedding, self._linear(weight[:vocab_size], None)

    def layer(self, index: int) -> library.Layer:
        arch, prefix = self._arch, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        hidden, inner = arch.hidden_size, arch.intermediate_size
        query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        head_norms: list[int | None] = [None, None]
        if arch.qk_norm:
            head_norms = [
                self.norm(f"{attention}{name}_norm.weight", arch.head_dim).data_ptr()
                for name in ("q", "k")
            ]
        qkv = [("q_proj", query), ("k_proj", key), ("v_proj", key)]
        gate_up = [("gate_proj", inner), ("up_proj", inner)]
        return library.Layer(
            self.norm(f"{prefix}input_layernorm.weight", hidden).data_ptr(),
            *head_norms,
            self.norm(f"{prefix}post_attention_layernorm.weight", hidden).data_ptr(),
            self._fused(attention, qkv, hidden, arch.qkv_bias, torch.cat),
            self._fused(attention, [("o_proj", hidden)], query, arch.output_bias, torch.cat),
            self._fused(mlp, gate_up, hidden, arch.mlp_bias, in_turn),
            self._fused(mlp, [("down_proj", hidden)], inner, arch.mlp_bias, torch.cat),
            arch.windows[index] or 0,
        )

    def norm(self, name: str, width: int) -> Tensor:
        """A norm's weight, float32, padded."""
        weight = self._read(name, width).float()
        return self._kept(functional.pad(weight, (0, padded(width) - width)))

    def _fused(
        self,
        prefix: str,
        parts: Sequence[tuple[str, int]],
        num_inputs: int,
        biased: bool,
        join: Callable[[list[Tensor]], Tensor],
    ) -> library.Linear:
        weights = [self._read(f"{prefix}{name}.weight", count, num_inputs) for name, count in parts]
        bias = None
        if biased:
            bias = join([self._read(f"{prefix}{name}.bias", count) for name, count in parts])
        return self._linear(join(weights), bias)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> library.Linear:
        num_outputs = len(weight)
        packed = self._kept(pack(weight))
        missing = padded(num_outputs) - num_outputs
        if bias is not None:
            bias = self._kept(functional.pad(bias.float(), (0, missing)))
        depth = packed.numel() // padded(num_outputs)
        address = None if bias is None else bias.data_ptr()
        return library.Linear(packed.data_ptr(), address, depth, padded(num_outputs) // PANEL)

    def _read(self, name: str, *shape: int) -> Tensor:
        tensor = self._checkpoint.get(name, shape)
        self.num_parameters += tensor.numel()
        return tensor.to(self._dtype)

    def _kept(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return tensor


def pack(weight: Tensor) -> Tensor:
    """[out, in] in panels, as the module's docstring says."""
    num_outputs, num_inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    depth = padded(num_inputs) if pair == 2 else num_inputs
    whole = functional.pad(weight, (0, depth - num_inputs, 0, padded(num_outputs) - num_outputs))
    panels = whole.view(-1, PANEL, depth // pair, pair)
    return panels.transpose(1, 2).contiguous()


def in_turn(parts: list[Tensor]) -> Tensor:
    """Rows of two tensors by turns, 16 of the first and 16 of the second; padded to that."""
    half = PANEL // 2
    blocks = []
    for part in parts:
        missing = padded(len(part), half) - len(part)
        filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
        blocks.append(filled.view(-1, half, *part.shape[1:]))
    return torch.stack(blocks, dim=1).flatten(0, 2)
