"""From the tensors of a Llama-shaped checkpoint to those that `llama_model` computes with.

Projections that read the same input become one matrix (q, k and v; gate and up), and the rows of
each query and key head are reordered so that rotated pairs are neighbours. Knows no forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipespec.runners.architecture import Architecture, Rope
from pipespec.runners.linear import DenseLinear, Linear, make_linear
from pipespec.runners.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights; norms as `Loader.norm` returns them."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None  # [num_heads + num_kv_heads, head_dim] float32, times sqrt(head_dim)
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


def rotations(rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """exp(i * position * frequency): [positions, 1, head_dim / 2] complex64.

    float32 throughout: at high positions the rounding of an angle matters, and models were trained
    with this one.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.factor is not None:
        turns = rope.original_length / (2 * torch.pi / frequencies)  # over the original context
        blend = (turns - rope.low_freq) / (rope.high_freq - rope.low_freq)
        blend = blend.clamp_(0.0, 1.0)
        frequencies = (1 - blend) * frequencies / rope.factor + blend * frequencies
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1).to(device)


class Loader:
    """Reads a checkpoint's tensors into the form that `llama_model` computes with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._checkpoint, self._arch, self._dtype = checkpoint, arch, dtype
        self._device, self._num_threads = device, num_threads
        self.num_parameters = 0
        self.weight_bytes = 0

    def embedding_and_head(self, vocab_size: int) -> tuple[Tensor, Linear]:
        """A checkpoint that has a head of its own uses it, whatever the config says of tying."""
        arch = self._arch
        embedding = self._read("model.embed_tokens.weight", arch.vocab_size, arch.hidden_size)
        embedding = embedding.to(self._device)
        self.weight_bytes += embedding.nbytes
        if "lm_head.weight" in self._checkpoint or not arch.tied_embeddings:
            weight = self._read("lm_head.weight", arch.vocab_size, arch.hidden_size)
            return embedding, self._linear([weight[:vocab_size].clone()], None)
        weight = embedding[:vocab_size]
        head = make_linear(weight, None, self._num_threads)
        shared = weight.nbytes if isinstance(head, DenseLinear) and head.is_view else 0
        self.weight_bytes += head.weight_bytes - shared
        return embedding, head

    def layer(self, index: int) -> Layer:
        arch, prefix = self._arch, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        hidden, inner = arch.hidden_size, arch.intermediate_size
        query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        qkv = [("q_proj", query), ("k_proj", key), ("v_proj", key)]
        qk_norm = None
        if arch.qk_norm:
            parts = [
                self._neighbours(self._scaled(f"{attention}{name}_norm.weight", arch.head_dim))
                .expand(count, -1)
                for name, count in (("q", arch.num_heads), ("k", arch.num_kv_heads))
            ]  # fmt: skip
            qk_norm = torch.cat(parts).contiguous()
        return Layer(
            attention_norm=self.norm(f"{prefix}input_layernorm.weight"),
            qkv=self._fused(attention, qkv, hidden, arch.qkv_bias),
            qk_norm=qk_norm,
            output=self._fused(attention, [("o_proj", hidden)], query, arch.output_bias),
            mlp_norm=self.norm(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._fused(
                mlp, [("gate_proj", inner), ("up_proj", inner)], hidden, arch.mlp_bias
            ),
            down=self._fused(mlp, [("down_proj", hidden)], inner, arch.mlp_bias),
        )

    def norm(self, name: str) -> Tensor:
        """The weight of an RMSNorm over the hidden size. On a GPU as stored, for torch's fused
        kernel; on CPU see `_scaled`."""
        width = self._arch.hidden_size
        if self._device.type == "cpu":
            return self._scaled(name, width)
        weight = self._read(name, width).to(self._device)
        self.weight_bytes += weight.nbytes
        return weight

    def _scaled(self, name: str, width: int) -> Tensor:
        """A norm's weight times sqrt(width), float32: for who divides by a sum's root."""
        weight = self._read(name, width).float().to(self._device)
        self.weight_bytes += weight.nbytes
        return weight * math.sqrt(width)

    def _fused(
        self, prefix: str, parts: Sequence[tuple[str, int]], num_inputs: int, biased: bool
    ) -> Linear:
        weights, biases = [], []
        for name, num_outputs in parts:
            weight = self._read(f"{prefix}{name}.weight", num_outputs, num_inputs)
            weights.append(self._neighbours(weight) if name in ("q_proj", "k_proj") else weight)
            if biased:
                bias = self._read(f"{prefix}{name}.bias", num_outputs)
                biases.append(self._neighbours(bias) if name in ("q_proj", "k_proj") else bias)
        return self._linear(weights, torch.cat(biases) if biased else None)

    def _linear(self, weights: list[Tensor], bias: Tensor | None) -> Linear:
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = None if bias is None else bias.to(self._device)
        linear = make_linear(weight.to(self._device), bias, self._num_threads)
        self.weight_bytes += linear.weight_bytes
        return linear

    def _neighbours(self, rows: Tensor) -> Tensor:
        """Reorders the rows of each head from (all first, all second of the rotated pairs) to
        pair after pair."""
        dim = self._arch.head_dim
        pairs = rows.view(-1, 2, dim // 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _read(self, name: str, *shape: int) -> Tensor:
        tensor = self._checkpoint.get(name, shape)
        self.num_parameters += tensor.numel()
        return tensor.to(self._dtype)
