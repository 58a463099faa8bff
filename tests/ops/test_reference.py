"""The reference backend's own ways: blocks of query rows, and how wide it computes."""

from __future__ import annotations

import pytest
import torch

from attn_kd.ops import reference
from tests.ops import explicit
from tests.ops.cases import (
    DIVERGENCES,
    Sizes,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

SIZES = Sizes(B=2, H=2, Lq=37, Lk=50)
MAP_ROW = SIZES.B * SIZES.H * SIZES.Lk

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@every_divergence
@pytest.mark.parametrize("rows", [1, 2, 7, 36, 37, 1000], ids=lambda n: f"blocks of {n}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_size_of_a_block_changes_nothing(monkeypatch, rows, dtype, divergence):
    inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
    mask = torch.rand(SIZES.B, 1, SIZES.Lq, SIZES.Lk) > 0.3
    lse = explicit.teacher_lse(*inputs.to(torch.float64)[3:], attn_mask=mask).float()
    options = {"attn_mask": mask, "teacher_lse": lse, "divergence": divergence}
    expected = run_backend("reference", inputs, cotangents, **options)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", rows * MAP_ROW)
    actual = run_backend("reference", inputs, cotangents, **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_a_block_is_at_least_one_row(monkeypatch):
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    expected = run_backend("reference", inputs, cotangents)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    actual = run_backend("reference", inputs, cotangents)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_gradients_of_many_blocks_add_up_in_float32(monkeypatch, dtype):
    """Hundreds of 16-bit additions would lose what a single rounding keeps."""
    sizes = Sizes(B=1, H=1, Lq=300, Lk=10)
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype).only("kl")
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    grad = run_backend("reference", inputs, cotangents)["grad_key"].float()
    expected = run_backend("reference", inputs.to(torch.float32), cotangents)["grad_key"]
    torch.testing.assert_close(grad, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
