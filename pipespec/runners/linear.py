"""Matrix products of the lean runner: which kernel, for which weight and how many rows.

On CPU there are two. *Dense* is MKL over the weight as [in, out], which for few rows it reads
faster than [out, in]: no set-up, but from four rows on slow for a weight that comes from memory and
not from a cache. *Packed* is oneDNN with the weight reordered once at load: about 20 us to enter,
then nearly flat from one row to eight. Measured with one thread (float32, dense/packed, us):

    weight MiB   from     1 row      2 rows     4 rows      8 rows
    0.2          cache       8/28       9/26       9/28       11/31    dense
    1.2          cache      44/66      46/67      49/68       67/96    dense
    2.1          cache     78/113     94/113    103/120     131/167    dense to 2 rows,
    2.1          memory   176/262    288/267    391/289     539/360    packed from 3
    5.0          cache    185/237    198/236    218/233     309/345    (both are kept)
    5.0          memory   484/720    878/852   1171/665    1304/855
    16           cache    601/674    668/704    740/670    1064/939    packed

bfloat16 and float16 are packed always (dense is up to twice as slow). With several threads dense
gains nothing for one row, so there it serves only the small. On a GPU everything is dense.

`torch.ops.mkldnn` is what torch.compile emits for frozen CPU models; it is probed, not assumed.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import Tensor

_SMALL: Final = 1 << 19  # elements: 2 MiB of float32
_LARGE: Final = 1 << 21  # 8 MiB of float32
_MAX_DENSE_ROWS: Final = 2


class Linear(Protocol):
    """x @ weight.T + bias, for x [rows, in] of the weight's dtype."""

    weight_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out], a new tensor."""
        ...

    def into(self, x: Tensor, out: Tensor) -> None:
        """Writes the product to `out` [rows, out], converting to its dtype."""
        ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + product; `residual` may be overwritten."""
        ...


class DenseLinear:
    """The weight as a plain matrix. is_view: whether it is the very tensor that was given."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.is_view = weight.device.type != "cpu" or weight.dtype != torch.float32
        transposed = weight.t()
        self._transposed = transposed if self.is_view else transposed.contiguous()
        self._bias = bias
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if self._bias is None:
            return torch.mm(x, self._transposed)
        return torch.addmm(self._bias, x, self._transposed)

    def into(self, x: Tensor, out: Tensor) -> None:
        if self._bias is None and out.dtype == x.dtype:
            torch.mm(x, self._transposed, out=out)
        else:
            out.copy_(self(x))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self._bias is not None:
            residual += self._bias
        return residual.addmm_(x, self._transposed)


class PackedLinear:
    """The weight in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias
        self._product: Any = torch.ops.mkldnn._linear_pointwise.default
        self._sum: Any = torch.ops.mkldnn._linear_pointwise.binary
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = self._product(x, self._weight, self._bias, "none", [], "")
        return product

    def into(self, x: Tensor, out: Tensor) -> None:
        out.copy_(self(x))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        total: Tensor = self._sum(x, residual, self._weight, self._bias, "add")
        return total


class EitherLinear:
    """Both, chosen by the number of rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._dense, self._packed = DenseLinear(weight, bias), PackedLinear(weight, bias)
        self.weight_bytes = self._dense.weight_bytes + self._packed.weight_bytes

    def _for(self, x: Tensor) -> Linear:
        return self._dense if len(x) <= _MAX_DENSE_ROWS else self._packed

    def __call__(self, x: Tensor) -> Tensor:
        return self._for(x)(x)

    def into(self, x: Tensor, out: Tensor) -> None:
        self._for(x).into(x, out)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._for(x).add_to(residual, x)


def make_linear(weight: Tensor, bias: Tensor | None, num_threads: int) -> Linear:
    """The fastest kernel for this weight [out, in], by the rule above.

    num_threads: of torch, in forwards to come.
    """
    if not _can_pack(weight):
        return DenseLinear(weight, bias)
    if weight.dtype != torch.float32:
        return PackedLinear(weight, bias)
    if weight.numel() < _SMALL:
        return DenseLinear(weight, bias)
    if weight.numel() < _LARGE and num_threads == 1:
        return EitherLinear(weight, bias)
    return PackedLinear(weight, bias)


def _can_pack(weight: Tensor) -> bool:
    """Whether this torch build and this processor have oneDNN kernels for the weight's dtype."""
    onednn: Any = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(onednn, name) for name in names):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(onednn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(onednn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
