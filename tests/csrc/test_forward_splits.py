"""Forward passes of so few rows that their keys are split, into ranges of 256 keys or more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.csrc.test_kernels import check, every_arithmetic
from tests.ops.cases import Sizes

pytestmark = pytest.mark.usefixtures("instruction_set")

ONE_PASS = ("reverse_kl", "forward_kl")  # the others make no difference before their second pass
Lk = 1100  # four ranges of 275
FEW = Sizes(B=1, H=2, Lq=3, Lk=Lk)

every_divergence = pytest.mark.parametrize("divergence", ONE_PASS)


@every_arithmetic
@every_divergence
@pytest.mark.parametrize("Lq", [1, 2, 3, 4, 5, 66], ids=lambda n: f"{n} queries")
def test_queries(Lq, divergence, dtype):
    check(FEW._replace(Lq=Lq), dtype, divergence=divergence)


@every_divergence
@pytest.mark.parametrize("width", [1, 16, 23, 32, 40, 64])
def test_widths_of_few_rows(width, divergence):
    check(FEW._replace(Lk=520, D=width, Dv=width, Dt=width + 3), divergence=divergence)


@every_divergence
@pytest.mark.parametrize("G", [2, 3])
def test_grouped_teacher_keys(G, divergence):
    check(FEW._replace(G=G, Lk=600), divergence=divergence)


def seen(*ranges: tuple[int, int]) -> Tensor:
    """Masks [1, 1, rows, Lk], one row for each range of keys that it sees."""
    at = torch.arange(Lk)
    return torch.stack([(at >= begin) & (at < end) for begin, end in ranges])[None, None]


MASKS = {
    "one range for all": seen((300, 400)),
    "the last key": seen((Lk - 1, Lk)),
    "no key": seen((0, 0)),
    "another range for each": seen((0, 100), (300, 400), (1000, Lk)),
    "one row sees none": seen((0, Lk), (0, 0), (500, 900)),
    "additive": torch.zeros(1, 1, 3, Lk).masked_fill(seen((0, 600), (600, Lk), (0, 1)), -1e9),
}


@every_divergence
@pytest.mark.parametrize("given", [False, True], ids=["computes teacher_lse", "given teacher_lse"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_hidden_ranges(mask, given, divergence):
    check(FEW, attn_mask=mask, divergence=divergence)
