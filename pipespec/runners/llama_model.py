"""The forward pass of a Llama-shaped model over a preallocated cache, written for short steps.

A draft's step is a few dozen operations of microseconds each, so what counts is their number:
projections are fused (q, k, v; gate, up), views are made once per query length, queries and keys
are rotated in place by one complex product (their weights are permuted at load so that rotated
pairs are neighbours; scores do not change), and keys and values reach the cache in one copy.

Arithmetic is in the model's dtype with these exceptions, all towards more precision: norms and
rotation are float32, and on CPU so are attention and the cache (bfloat16 attention there costs a
oneDNN call per head and block). The module knows no request, slot or token choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipespec.runners.architecture import Architecture, Rope
from pipespec.runners.linear import DenseLinear, Linear, make_linear
from pipespec.runners.weights import Checkpoint, open_checkpoint

_MASK_OF_BIT = np.array([-np.inf, 0.0], dtype=np.float32)
MAX_SHORT = 64  # query lengths up to this keep their buffers and masks


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights. Norm weights are float32 and carry the factor sqrt(width)."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None  # [num_heads + num_kv_heads, head_dim]
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class KeyValues:
    """The cache of one slot: [2 * layers, 1, kv_heads, context, head_dim], keys before values."""

    def __init__(
        self, arch: Architecture, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2 * arch.num_layers, 1, arch.num_kv_heads, context_length, arch.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._pairs = self.data.view(arch.num_layers, 2, *shape[2:])

    def written(self, start: int, count: int) -> tuple[Tensor, ...]:
        """For each layer the [2, kv_heads, count, head_dim] that positions from `start` fill."""
        return self._pairs.narrow(3, start, count).unbind()

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Copies `rows` to `start` and after."""
        self.data[:, :, :, start : start + len(rows)] = self.data[:, :, :, list(rows)]

    def read(self, end: int) -> tuple[Tensor, ...]:
        """Keys and values in turn, layer by layer: [1, kv_heads, end, head_dim]."""
        return self.data.narrow(3, 0, end).unbind()


@dataclass(frozen=True, slots=True)
class Tail:
    """The last of the fed tokens as branches: stored in rows from `first_row`, at `positions`.
    `visible`: for every fed token the cache rows that it sees, itself included, bit by bit."""

    first_row: int
    positions: Sequence[int]
    visible: Sequence[int]


class Workspace:
    """Buffers and views for one query length, shared by all layers.

    Grouped heads are folded into rows: the queries of one key-value head at all `rows` positions
    stand together as [1, kv_heads, rows * group, head_dim], so its keys are read once. Long
    prompts leave that to the attention kernel.
    """

    def __init__(self, arch: Architecture, rows: int, model: torch.dtype, cache: Tensor) -> None:
        device, dim, kv_heads = cache.device, arch.head_dim, arch.num_kv_heads
        self.rows = rows
        self.group = arch.num_heads // kv_heads
        self.folded = self.group > 1 and rows <= MAX_SHORT
        self.enable_gqa = self.group > 1 and not self.folded
        num_rotated = arch.num_heads + kv_heads
        width = num_rotated + kv_heads
        self.qkv = torch.empty(rows, width * dim, dtype=torch.float32, device=device)
        heads = self.qkv.view(rows, width, dim)
        self.query_key = heads[:, :num_rotated]
        self.rotated = torch.view_as_complex(self.query_key.view(rows, num_rotated, dim // 2, 2))
        self.new = heads[:, arch.num_heads :].view(rows, 2, kv_heads, dim).permute(1, 2, 0, 3)
        query = heads[:, : arch.num_heads]
        if self.folded:
            self._source = query.view(rows, kv_heads, self.group, dim).permute(1, 0, 2, 3)
        else:
            self._source = query.transpose(0, 1)
        self._target: Tensor | None = None
        if cache.dtype == torch.float32 and (rows == 1 or not self.folded):
            self._query = self._source.flatten(1, -2).unsqueeze(0)  # a view
        else:
            self._target = torch.empty(self._source.shape, dtype=cache.dtype, device=device)
            self._query = self._target.flatten(1, -2).unsqueeze(0)
        self.gate_up = torch.empty(rows, 2 * arch.intermediate_size, dtype=model, device=device)
        self.gate, self.up = self.gate_up.chunk(2, dim=1)

    def query(self) -> Tensor:
        """The rotated queries as attention wants them."""
        if self._target is not None:
            self._target.copy_(self._source)
        return self._query

    def merged(self, attended: Tensor) -> Tensor:
        """Attention's result as [rows, num_heads * head_dim]."""
        if self.folded:
            kv_heads, _, dim = attended.shape[1:]
            grouped = attended.view(kv_heads, self.rows, self.group, dim)
            attended = grouped.permute(1, 0, 2, 3)
        else:
            attended = attended.transpose(1, 2)
        return attended.reshape(self.rows, -1)


class LlamaModel:
    """Weights on one device, and the forward pass. Use inside `torch.inference_mode`.

    vocab_size: ids that may be drawn; the head has no other rows. num_threads: of torch.
    """

    def __init__(
        self,
        folder: Path,
        arch: Architecture,
        *,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        context_length: int,
        num_extra_rows: int,
        num_threads: int,
    ) -> None:
        self.arch, self.dtype, self.device = arch, dtype, device
        self.cache_dtype = torch.float32 if device.type == "cpu" else dtype
        self.num_parameters = 0
        self._context_length = context_length
        self._num_rows = context_length + num_extra_rows
        self._rotations = rotations(arch.rope, arch.head_dim, context_length, device)
        self._eps = torch.tensor(arch.hidden_size * arch.norm_eps, device=device)
        self._head_eps = torch.tensor(arch.head_dim * arch.norm_eps, device=device)
        self._spaces: dict[int, Workspace] = {}
        self._masks: dict[int | None, Tensor] = {}  # by window
        with open_checkpoint(folder) as checkpoint:
            loader = _Loader(checkpoint, arch, dtype, device, num_threads)
            self.embedding, self.head = loader.embedding_and_head(vocab_size)
            self.layers = tuple(loader.layer(index) for index in range(arch.num_layers))
            self.norm = loader.norm("model.norm.weight")
            self.num_parameters = loader.num_parameters
            self.weight_bytes = loader.weight_bytes

    def new_cache(self) -> KeyValues:
        return KeyValues(self.arch, self._num_rows, self.cache_dtype, self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab_size] in the model's dtype, from what `forward` returned."""
        return self.head(self._normed(hidden, self.norm))

    def forward(
        self, ids: Sequence[int], start: int, cache: KeyValues, tail: Tail | None = None
    ) -> Tensor:
        """Feeds `ids` at positions from `start`; positions before must be in the cache. The last of
        them may be a `tail` instead.

        Returns the last layer's output, [len(ids), hidden_size].
        """
        rows = len(ids)
        space = self._workspace(rows, cache)
        if tail is None:
            end = start + rows
            rotation = self._rotations[start:end]
            masks = self._layer_masks(rows, end)
            writes = [(cache.written(start, rows), space.new)]
        else:
            end = tail.first_row + len(tail.positions)
            num_own = rows - len(tail.positions)
            positions = [*range(start, start + num_own), *tail.positions]
            rotation = self._rotations[torch.tensor(positions, device=self.device)]
            masks = [(self._tree_mask(tail.visible, end), False)] * len(self.layers)
            writes = [(cache.written(tail.first_row, rows - num_own), space.new[:, :, num_own:])]
            if num_own:
                writes.append((cache.written(start, num_own), space.new[:, :, :num_own]))
        cached = cache.read(end)
        x = self.embedding.index_select(0, torch.tensor(ids, device=self.device))
        for index, layer in enumerate(self.layers):
            layer.qkv.into(self._normed(x, layer.attention_norm), space.qkv)
            if layer.qk_norm is not None:
                self._normalize_heads(space.query_key, layer.qk_norm)
            space.rotated.mul_(rotation)
            for target, new in writes:
                target[index].copy_(new)
            mask, is_causal = masks[index]
            attended = functional.scaled_dot_product_attention(
                space.query(), cached[2 * index], cached[2 * index + 1], mask, 0.0, is_causal,
                enable_gqa=space.enable_gqa,
            )  # fmt: skip
            x = layer.output.add_to(x, space.merged(attended).to(self.dtype))
            layer.gate_up.into(self._normed(x, layer.mlp_norm), space.gate_up)
            x = layer.down.add_to(x, functional.silu(space.gate).mul_(space.up))
        return x

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight; half the time of torch's on CPU."""
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        inverse = torch.addcmul(self._eps, length, length).rsqrt_()
        return (x * inverse).mul_(weight).to(self.dtype)

    def _normalize_heads(self, heads: Tensor, weight: Tensor) -> None:
        length = torch.linalg.vector_norm(heads, 2, -1, True)
        heads.mul_(torch.addcmul(self._head_eps, length, length).rsqrt_()).mul_(weight)

    def _workspace(self, rows: int, cache: KeyValues) -> Workspace:
        space = self._spaces.get(rows)
        if space is None:
            space = Workspace(self.arch, rows, self.dtype, cache.data)
            if rows <= MAX_SHORT:
                self._spaces[rows] = space
        return space

    def _layer_masks(self, rows: int, end: int) -> list[tuple[Tensor | None, bool]]:
        """For each layer attention's mask and is_causal."""
        windows = self.arch.windows
        masks = {window: self._mask(rows, end, window) for window in set(windows)}
        return [masks[window] for window in windows]

    def _mask(self, rows: int, end: int, window: int | None) -> tuple[Tensor | None, bool]:
        unlimited = window is None or end <= window
        if rows == 1 and unlimited:
            return None, False
        folded = self.arch.num_heads > self.arch.num_kv_heads and rows <= MAX_SHORT
        if rows == end and unlimited and not folded:
            return None, True
        repeats = self.arch.num_heads // self.arch.num_kv_heads if folded else 1
        if rows > MAX_SHORT:
            return self._new_mask(rows, end, window, repeats), False
        table = self._mask_table(rows, end, window, repeats)
        mask = table[table.shape[0] - rows * repeats :, table.shape[1] - end :]
        # Kernels on a GPU may want a mask that starts at an aligned address.
        return mask.contiguous() if self.device.type == "cuda" else mask, False

    def _mask_table(self, rows: int, end: int, window: int | None, repeats: int) -> Tensor:
        """A mask of at least `rows` and `end` columns, from which smaller ones are cut: counted
        from the last row and column all are alike. It doubles when a text or query outgrows it."""
        table = self._masks.get(window)
        height, width = (0, 0) if table is None else (table.shape[0] // repeats, table.shape[1])
        if table is None or height < rows or width < end:
            width = min(self._context_length, _power_of_two(max(256, width, end)))
            height = min(width, _power_of_two(max(16, height, rows)))
            table = self._masks[window] = self._new_mask(height, width, window, repeats)
        return table

    def _tree_mask(self, visible: Sequence[int], end: int) -> Tensor:
        """[rows, end] (times the heads that share keys): 0 where a bit is set, else -inf."""
        num_bytes = (end + 7) // 8
        packed = b"".join(bits.to_bytes(num_bytes, "little") for bits in visible)
        table = np.frombuffer(packed, np.uint8).reshape(len(visible), num_bytes)
        seen = np.unpackbits(table, axis=1, count=end, bitorder="little")
        mask = torch.from_numpy(_MASK_OF_BIT[seen]).to(self.device, self.cache_dtype)
        repeats = self.arch.num_heads // self.arch.num_kv_heads
        return mask if repeats == 1 else mask.repeat_interleave(repeats, dim=0)

    def _new_mask(self, rows: int, width: int, window: int | None, repeats: int) -> Tensor:
        """[rows * repeats, width], 0 or -inf: row r stands at column width - rows + r."""
        columns = torch.arange(width, device=self.device)
        at = columns[width - rows :].unsqueeze(1)
        hidden = columns > at
        if window is not None:
            hidden |= columns <= at - window
        mask = torch.zeros(rows, width, dtype=self.cache_dtype, device=self.device)
        return mask.masked_fill_(hidden, -torch.inf).repeat_interleave(repeats, dim=0)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


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


class _Loader:
    """Reads a checkpoint's tensors into the form that `LlamaModel` computes with."""

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
                self._neighbours(self.norm(f"{attention}{name}_norm.weight", arch.head_dim))
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

    def norm(self, name: str, width: int | None = None) -> Tensor:
        """A norm's weight times sqrt(width), float32: `LlamaModel` divides by a sum's root."""
        width = width or self._arch.hidden_size
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
