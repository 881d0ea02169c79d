"""Every kernel of the lean runner's matrix products equals the plain product."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipespec.runners.linear import DenseLinear, make_linear
from tests.tiny import one_thread  # noqa: F401


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (1100, 512), (2304, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_equals_the_plain_product(
    dtype: torch.dtype, shape: tuple[int, int], biased: bool, num_threads: int
) -> None:
    """The sizes fall on either side of each threshold; the twin is float64."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    weight, bias = normal(shape).div(shape[1] ** 0.5).to(dtype), normal(shape[0]).to(dtype)
    linear = make_linear(weight, bias if biased else None, num_threads)
    dense = DenseLinear(weight, bias if biased else None)
    tolerance = 16 * torch.finfo(dtype).eps  # sums of up to 1024 products, in another order
    for num_rows in (1, 2, 3, 5, 9, 17):
        x, residual = normal(num_rows, shape[1]).to(dtype), normal(num_rows, shape[0]).to(dtype)
        expected = functional.linear(x.double(), weight.double(), bias.double() if biased else None)
        for kernel in (linear, dense):
            out = torch.full((num_rows, shape[0]), torch.nan)
            kernel.into(x, out)
            assert largest(kernel(x).double() - expected) < tolerance * largest(expected)
            assert largest(out.double() - expected) < tolerance * largest(expected)
            total, wanted = kernel.add_to(residual.clone(), x), expected + residual.double()
            assert largest(total.double() - wanted) < tolerance * largest(wanted)
