"""16-bit storage: reading and rounding, observed through attention over one or two keys.

One key leaves its value untouched: output = value. Two keys with equal logits give their mean, a
float32 that is then rounded.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_kd

pytestmark = pytest.mark.usefixtures("instruction_set")

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)
COLUMNS = 256


def every_number(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns, as [1, 256, 1, 256]."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).view(1, COLUMNS, 1, COLUMNS)


def attend(value: Tensor) -> Tensor:
    """Output of one query row with equal logits for every key."""
    zeros = torch.zeros(*value.shape[:3], 1, dtype=value.dtype)
    return attn_kd.attention(zeros[:, :, :1], zeros, value, backend="cpu").output


def as_multiplied(value: Tensor, instruction_set: str) -> Tensor:
    """The numbers that products see: dot-product instructions know no subnormals."""
    if instruction_set != "avx512_bf16" or value.dtype != torch.bfloat16:
        return value
    return torch.where(value.abs() < torch.finfo(value.dtype).smallest_normal, 0, value)


@every_dtype
def test_every_number_survives(dtype, instruction_set):
    value = every_number(dtype)
    output, value = attend(value), as_multiplied(value, instruction_set)
    finite = value.isfinite()
    assert torch.equal(output[finite], value[finite])
    assert torch.equal(output.isnan(), value.isnan())
    assert torch.equal(output[value.isinf()], value[value.isinf()])


@every_dtype
@pytest.mark.parametrize("other", ["next", "shuffled"])
def test_means_are_rounded_to_nearest_even(dtype, other, instruction_set):
    """Neighbours' means are ties; shuffled numbers' means are anything, overflow included."""
    first = as_multiplied(every_number(dtype), instruction_set)
    order = torch.arange(2**16).roll(1) if other == "next" else torch.randperm(2**16)
    second = first.flatten()[order].view(first.shape)
    finite = first.isfinite() & second.isfinite()
    value = torch.cat([first, second], dim=2)
    total = first.float() + second.float()
    if instruction_set == "avx512_bf16" and dtype == torch.bfloat16:
        total[total.abs() < torch.finfo(dtype).smallest_normal] = 0
    expected = total.mul(0.5).to(dtype)
    actual = attend(torch.where(finite, value, 0))
    # -0 and 0 are equal, and sums of float32 may lose the sign of a zero
    assert torch.equal(actual[finite], expected[finite])


def test_float16_overflows_to_infinity():
    """A gradient beyond 65504, here of three rows that each send 40000, becomes infinite."""
    query, key = torch.zeros(1, 1, 3, 1).half(), torch.zeros(1, 1, 1, 1).half()
    value = torch.zeros(1, 1, 1, 1).half().requires_grad_()
    output = attn_kd.attention(query, key, value, backend="cpu").output
    output.backward(torch.full_like(output, 40000.0))
    assert value.grad.item() == torch.inf
