"""What the tests change about Triton's interpreter: its conversions to and from bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.interpreter import _converting_bfloat16

tl = pytest.importorskip("triton.language")

NUMBERS = torch.cat(
    [
        torch.randn(1000, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]),
        # half a unit of bfloat16 above 1, which goes to the even 1, and above the odd one after it
        torch.tensor([1 + 2**-8, 1 + 2**-7 + 2**-8, 1 + 2**-8 + 2**-20]),
        torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny, 1e-40]),
    ]
)


def convert(numbers: np.ndarray, source: object, target: object) -> np.ndarray:
    def unexpected(*_: object) -> np.ndarray:
        raise AssertionError("left to Triton")

    return _converting_bfloat16(unexpected, tl)(numbers, source, target, None)


def test_to_bfloat16_rounds_as_torch_does():
    bits = convert(NUMBERS.numpy(), tl.float32, tl.bfloat16)
    assert bits.dtype == np.uint16
    actual = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(actual, NUMBERS.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_from_bfloat16_is_exact():
    numbers = NUMBERS.bfloat16()
    actual = convert(numbers.view(torch.int16).numpy().view(np.uint16), tl.bfloat16, tl.float32)
    expected = numbers.float()
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=0, equal_nan=True)


def test_other_conversions_are_left_to_triton():
    with pytest.raises(AssertionError, match="left to Triton"):
        convert(NUMBERS.numpy(), tl.float32, tl.float16)
