"""The kernels' log2 against the exact one, in units in the last place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("instruction_set")

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def ulp_error(y: Tensor, exact: Tensor) -> float:
    """The largest error, in units in the last place of the exact value in y's dtype."""
    unit = torch.exp2(exact.abs().log2().floor()) * torch.finfo(y.dtype).eps
    return ((y.double() - exact).abs() / unit).max().item()


def test_float32_within_three_ulp(module):
    # all floats of the octaves around 1 in steps, where the logarithm is small, then all exponents
    near = torch.arange(0x3F000000, 0x40000000, 7, dtype=torch.int32).view(torch.float32)
    everywhere = torch.exp2(torch.linspace(-126, 127, 500_000, dtype=torch.float64)).float()
    for x in (near[near != 1], everywhere[everywhere != 1]):
        assert ulp_error(module.log2(x), torch.log2(x.double())) <= 3


def test_float64_close_to_one(module):
    """log1p of a small argument is accurate, and 1 + d here is exact."""
    d = torch.ldexp(torch.randint(-(2**20), 2**20, (100_000,)).double(), torch.tensor(-40))
    d = d[d != 0]
    exact = torch.log1p(d) / math.log(2)
    assert ulp_error(module.log2(1 + d), exact) <= 4  # one of them is the division's


def test_float64_everywhere(module):
    x = torch.exp2(torch.linspace(-1022, 1023, 500_000, dtype=torch.float64))
    torch.testing.assert_close(module.log2(x), torch.log2(x), rtol=1e-15, atol=1e-16)


@BOTH
def test_powers_of_two_are_exact(module, dtype):
    n = torch.arange(-126, 128, dtype=dtype)
    assert torch.equal(module.log2(torch.ldexp(torch.ones_like(n), n)), n)


@BOTH
def test_nan_and_infinity_give_nan_in_their_own_lane(module, dtype):
    x = torch.full((40,), 2.0, dtype=dtype)
    x[3], x[17] = math.nan, math.inf
    y = module.log2(x)
    assert y[[3, 17]].isnan().all()
    assert (y[x == 2.0] == 1.0).all()
