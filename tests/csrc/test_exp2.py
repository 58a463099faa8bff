"""The kernels' 2**x against the exact one, in units in the last place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("instruction_set")

INF, NAN = math.inf, math.nan


def ulp_error(y: Tensor, exact: Tensor) -> float:
    """The largest error, in units in the last place of the exact value in y's dtype."""
    unit = torch.exp2(exact.log2().floor()) * torch.finfo(y.dtype).eps
    return ((y.double() - exact).abs() / unit).max().item()


def float_arguments() -> Iterator[Tensor]:
    """The normal range in steps of 2**-14, many floats of one octave and those around 0."""
    yield torch.arange(-126 * 2**14, 126 * 2**14, dtype=torch.float64).div(2**14).float()
    octave = torch.arange(2**23, 2**24, 7, dtype=torch.int32).sub(2**23).add(0x3F000000)
    yield -octave.view(torch.float32)
    yield -torch.logspace(-45, -1, 100_000, dtype=torch.float64).float()


def test_float32_within_two_ulp(module):
    for x in float_arguments():
        assert ulp_error(module.exp2(x), torch.exp2(x.double())) <= 2


def test_short_float32_within_three_ulp(module):
    """And within 2e-7 of the number, which is less than three units where they are largest."""
    for x in float_arguments():
        exact, y = torch.exp2(x.double()), module.short_exp2(x)
        assert ulp_error(y, exact) <= 3
        assert ((y - exact).abs() / exact).max() <= 2e-7


def test_float64_within_two_ulp(module):
    # x = n + f exactly, so that 2**x = 2**n * 2**f; expm1 of a small argument is accurate
    f = torch.rand(200_000, dtype=torch.float64) - 0.5
    n = -torch.randint(0, 1020, f.shape).double()
    f = (n + f) - n  # what is left of f after the sum is rounded
    exact = torch.ldexp(torch.exp2(f), n)
    assert ulp_error(module.exp2(n + f), exact) <= 2


def test_powers_of_two_are_exact(module):
    for dtype, lowest in ((torch.float32, -126), (torch.float64, -1022)):
        n = torch.arange(lowest, 1, dtype=dtype)
        assert torch.equal(module.exp2(n), torch.ldexp(torch.ones_like(n), n))


def test_arguments_above_zero(module):
    """Logits may exceed their origin."""
    x = torch.linspace(0.0, 1020.0, 100_000, dtype=torch.float64)
    assert ulp_error(module.exp2(x), torch.exp2(x)) <= 2
    x = torch.logspace(-9, -1, 10_000, dtype=torch.float64)
    assert ulp_error(module.exp2(x.float()), torch.exp2(x.float().double())) <= 2
    assert ulp_error(module.exp2(x), torch.exp2(x)) <= 2


@pytest.mark.parametrize(
    ("function", "dtype"),
    [("exp2", torch.float32), ("exp2", torch.float64), ("short_exp2", torch.float32)],
    ids=["float32", "float64", "short"],
)
def test_special_values(module, function, dtype):
    x = torch.tensor([-INF, 0.0, -0.0, NAN, -1e30, torch.finfo(dtype).min, INF, 5e3], dtype=dtype)
    y = getattr(module, function)(x)
    assert y[[0, 4, 5]].tolist() == [0, 0, 0]
    assert y[[1, 2]].tolist() == [1, 1]
    assert y[3].isnan()
    # Sums of as much exceed any room; whether they are infinite does not matter.
    assert (y[6:] >= (2.0**127 if dtype == torch.float32 else 2.0**1023)).all()


def test_special_values_do_not_reach_their_neighbours(module):
    x = torch.full((64,), -1.0)
    for at, value in ((0, NAN), (7, -INF), (13, INF), (31, -1e30)):
        x[at] = value
    y = module.exp2(x)
    assert (y[x == -1.0] == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_underflow_is_gradual_or_flushed(module, dtype):
    """Below the smallest normal number: the rounded result or 0, never more, never negative."""
    smallest = torch.finfo(dtype).smallest_normal
    lowest = math.log2(smallest)
    x = torch.linspace(lowest - 60, lowest - 1e-3, 5000, dtype=dtype)
    y = module.exp2(x)
    assert ((y >= 0) & (y <= smallest)).all()
    gradual = torch.exp2(x.double()).to(dtype)
    assert ((y == 0) | ((y - gradual).abs() <= 2 * smallest * torch.finfo(dtype).eps)).all()
    assert (module.exp2(x - 200) == 0).all()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8, 15, 16, 17, 33])
def test_every_length(module, count):
    x = -torch.rand(count)
    torch.testing.assert_close(module.exp2(x), torch.exp2(x))
