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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pipespec.runners.architecture import Architecture
from pipespec.runners.llama_weights import Loader, rotations
from pipespec.runners.masks import MAX_SHORT, LayerMasks, Masks
from pipespec.runners.weights import open_checkpoint


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

    def write_at(self, layer: int, rows: Tensor, new: Tensor) -> None:
        """Stores `new` [2, kv_heads, count, head_dim] in `rows` [count]. No shape and no
        address depends on a value."""
        self._pairs[layer].index_copy_(2, rows, new.to(self.data.dtype))

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


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens stand, by tensors on the device: positions [n], cache rows [n] that they are
    stored in, masks over the first `capacity` rows."""

    positions: Tensor
    rows: Tensor
    masks: LayerMasks
    capacity: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Where the tokens of one forward stand. rotation: [rows, 1, head_dim / 2] complex64. store:
    writes a layer's new keys and values. cached: what attention reads, see `KeyValues.read`."""

    rotation: Tensor
    masks: LayerMasks
    store: Callable[[int], None]
    cached: tuple[Tensor, ...]


class Workspace:
    """Buffers and views for one query length, shared by all layers.

    Grouped heads are folded into rows: the queries of one key-value head at all `rows` positions
    stand together as [1, kv_heads, rows * group, head_dim], so its keys are read once. Long
    prompts leave that to the attention kernel.
    """

    def __init__(
        self,
        arch: Architecture,
        rows: int,
        model: torch.dtype,
        cache: torch.dtype,
        device: torch.device,
    ) -> None:
        dim, kv_heads = arch.head_dim, arch.num_kv_heads
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
        if cache == torch.float32 and (rows == 1 or not self.folded):
            self._query = self._source.flatten(1, -2).unsqueeze(0)  # a view
        else:
            self._target = torch.empty(self._source.shape, dtype=cache, device=device)
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

    vocab_size: ids that may be drawn; the head has no other rows. num_rows: of a slot's cache; its
    positions and whatever is stored beside them. num_threads: of torch.
    """

    def __init__(
        self,
        folder: Path,
        arch: Architecture,
        *,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        num_rows: int,
        num_threads: int,
    ) -> None:
        self.arch, self.dtype, self.device = arch, dtype, device
        self.cache_dtype = torch.float32 if device.type == "cpu" else dtype
        self.num_rows = num_rows
        self._rotations = rotations(arch.rope, arch.head_dim, num_rows, device)
        self._eps = torch.tensor(arch.hidden_size * arch.norm_eps, device=device)
        self._head_eps = torch.tensor(arch.head_dim * arch.norm_eps, device=device)
        self._spaces: dict[int, Workspace] = {}
        self.masks = Masks(arch, num_rows, self.cache_dtype, device)
        with open_checkpoint(folder) as checkpoint:
            loader = Loader(checkpoint, arch, dtype, device, num_threads)
            self.embedding, self.head = loader.embedding_and_head(vocab_size)
            self.layers = tuple(loader.layer(index) for index in range(arch.num_layers))
            self.norm = loader.norm("model.norm.weight")
            self.num_parameters = loader.num_parameters
            self.weight_bytes = loader.weight_bytes

    def new_cache(self) -> KeyValues:
        return KeyValues(self.arch, self.num_rows, self.cache_dtype, self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab_size] in the model's dtype, from what a forward returned."""
        return self.head(self._normed(hidden, self.norm))

    def logits_into(self, hidden: Tensor, out: Tensor) -> None:
        """Writes `logits(hidden)` to `out`."""
        self.head.into(self._normed(hidden, self.norm), out)

    def forward(
        self, ids: Sequence[int], start: int, cache: KeyValues, tail: Tail | None = None
    ) -> Tensor:
        """Feeds `ids` at positions from `start`; positions before must be in the cache. The last of
        them may be a `tail` instead.

        Returns the last layer's output, [len(ids), hidden_size].
        """
        space = self.workspace(len(ids))
        feed = (
            self._text_feed(start, cache, space)
            if tail is None
            else self._branch_feed(start, cache, space, tail)
        )
        return self._run(torch.tensor(ids, device=self.device), feed, space)

    def forward_at(self, ids: Tensor, places: Places, cache: KeyValues) -> Tensor:
        """`forward` of `ids` [n], a tensor on the device: what is done depends on shapes alone, so
        a CUDA graph can hold it, and every address is that of an argument or of what the model
        keeps."""
        space = self.workspace(len(ids))

        def store(layer: int) -> None:
            cache.write_at(layer, places.rows, space.new)

        rotation = self._rotations.index_select(0, places.positions)
        feed = Feed(rotation, places.masks, store, cache.read(places.capacity))
        return self._run(ids, feed, space)

    def workspace(self, rows: int) -> Workspace:
        """The buffers for a query length; kept, if it is short."""
        space = self._spaces.get(rows)
        if space is None:
            space = Workspace(self.arch, rows, self.dtype, self.cache_dtype, self.device)
            if rows <= MAX_SHORT:
                self._spaces[rows] = space
        return space

    def _text_feed(self, start: int, cache: KeyValues, space: Workspace) -> Feed:
        end = start + space.rows
        written = cache.written(start, space.rows)

        def store(layer: int) -> None:
            written[layer].copy_(space.new)

        masks = self.masks.of_text(space.rows, end)
        return Feed(self._rotations[start:end], masks, store, cache.read(end))

    def _branch_feed(self, start: int, cache: KeyValues, space: Workspace, tail: Tail) -> Feed:
        end = tail.first_row + len(tail.positions)
        num_own = space.rows - len(tail.positions)
        positions = torch.tensor(
            [*range(start, start + num_own), *tail.positions], device=self.device
        )
        beside = cache.written(tail.first_row, len(tail.positions))
        own = cache.written(start, num_own)

        def store(layer: int) -> None:
            beside[layer].copy_(space.new[:, :, num_own:])
            if num_own:
                own[layer].copy_(space.new[:, :, :num_own])

        masks = self.masks.of_branches(tail.visible, end)
        return Feed(self._rotations[positions], masks, store, cache.read(end))

    def _run(self, ids: Tensor, feed: Feed, space: Workspace) -> Tensor:
        """All layers over the tokens `ids`. Returns [rows, hidden_size]."""
        cached = feed.cached
        x = self.embedding.index_select(0, ids)
        for index, layer in enumerate(self.layers):
            layer.qkv.into(self._normed(x, layer.attention_norm), space.qkv)
            if layer.qk_norm is not None:
                self._normalize_heads(space.query_key, layer.qk_norm)
            space.rotated.mul_(feed.rotation)
            feed.store(index)
            mask, is_causal = feed.masks[index]
            attended = functional.scaled_dot_product_attention(
                space.query(), cached[2 * index], cached[2 * index + 1], mask, 0.0, is_causal,
                enable_gqa=space.enable_gqa,
            )  # fmt: skip
            x = layer.output.add_to(x, space.merged(attended).to(self.dtype))
            layer.gate_up.into(self._normed(x, layer.mlp_norm), space.gate_up)
            x = layer.down.add_to(x, functional.silu(space.gate).mul_(space.up))
        return x

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once."""
        if self.device.type != "cpu":  # one kernel instead of six
            return functional.rms_norm(x, x.shape[-1:], weight, self.arch.norm_eps)
        # Half the time of torch's.
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        inverse = torch.addcmul(self._eps, length, length).rsqrt_()
        return (x * inverse).mul_(weight).to(self.dtype)

    def _normalize_heads(self, heads: Tensor, weight: Tensor) -> None:
        length = torch.linalg.vector_norm(heads, 2, -1, True)
        heads.mul_(torch.addcmul(self._head_eps, length, length).rsqrt_()).mul_(weight)
