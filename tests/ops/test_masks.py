"""Masks: every kind and every way to broadcast, and rows that see no key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_kd
from tests.ops import explicit
from tests.ops.cases import (
    DIVERGENCES,
    DTYPES,
    Inputs,
    Sizes,
    assert_as_accurate_as_eager,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

B, H, Lq, Lk = 2, 3, 75, 110
SIZES = Sizes(B=B, H=H, Lq=Lq, Lk=Lk)
BROADCASTS = {
    "key padding [B, 1, 1, Lk]": (B, 1, 1, Lk),
    "[Lq, Lk]": (Lq, Lk),
    "[H, 1, Lk]": (H, 1, Lk),
    "[B, 1, Lq, Lk]": (B, 1, Lq, Lk),
    "[B, H, Lq, Lk]": (B, H, Lq, Lk),
    "rows [B, H, Lq, 1]": (B, H, Lq, 1),
    "[1]": (1,),
    "[Lk]": (Lk,),
}

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_broadcast = pytest.mark.parametrize("shape", BROADCASTS.values(), ids=BROADCASTS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def check(backend: str, mask: Tensor, dtype: torch.dtype = torch.float32, **options) -> None:
    inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
    before = mask.clone()
    actual = run_backend(backend, inputs, cotangents, attn_mask=mask, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, attn_mask=mask, **options)
    assert torch.equal(mask, before)


@every_broadcast
@every_divergence
def test_bool(backend, shape, divergence):
    check(backend, torch.rand(shape) > 0.4, divergence=divergence)


@every_broadcast
@every_divergence
def test_additive(backend, shape, divergence):
    check(backend, torch.randn(shape), divergence=divergence)


@every_broadcast
@every_divergence
def test_additive_with_minus_infinity(backend, shape, divergence):
    mask = torch.randn(shape).masked_fill(torch.rand(shape) > 0.6, -torch.inf)
    check(backend, mask, divergence=divergence)


@every_dtype
@pytest.mark.parametrize("mask_dtype", DTYPES, ids=name_of)
def test_every_dtype(backend, dtype, mask_dtype):
    mask = torch.randn(B, 1, Lq, Lk).to(mask_dtype)
    check(backend, mask.masked_fill(torch.rand(mask.shape) > 0.8, -torch.inf), dtype)


@every_dtype
@pytest.mark.parametrize("mask_dtype", DTYPES, ids=name_of)
def test_lowest_finite_number_hides(backend, dtype, mask_dtype):
    hidden = torch.rand(B, 1, 1, Lk) > 0.6
    mask = torch.zeros(hidden.shape, dtype=mask_dtype)
    check(backend, mask.masked_fill(hidden, torch.finfo(mask_dtype).min), dtype)


def test_lowest_finite_number_for_a_whole_row_is_no_visible_key(backend):
    mask = torch.zeros(Lq, Lk)
    mask[3] = torch.finfo(torch.float32).min
    out = attn_kd.attention_kl(*random_inputs(SIZES), attn_mask=mask, backend=backend)
    assert (out.output[:, :, 3] == 0).all() and (out.kl[:, :, 3] == 0).all()
    assert (out.lse[:, :, 3] == -torch.inf).all()


@every_divergence
def test_mask_with_any_strides(backend, divergence):
    transposed = (torch.rand(Lk, Lq) > 0.3).T
    check(backend, transposed, divergence=divergence)
    every_other = torch.randn(B, 1, 2 * Lq, 2 * Lk)[:, :, 1::2, ::2]
    check(backend, every_other, divergence=divergence)


@every_divergence
def test_given_teacher_lse(backend, divergence):
    mask = torch.randn(B, 1, Lq, Lk).masked_fill(torch.rand(B, 1, Lq, Lk) > 0.7, -torch.inf)
    mask[:, :, 5] = -torch.inf
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    lse = explicit.teacher_lse(*inputs.to(torch.float64)[3:], attn_mask=mask.double())
    options = {"attn_mask": mask, "teacher_lse": lse.float(), "divergence": divergence}
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


@every_divergence
def test_one_visible_key_gives_its_value(backend, divergence):
    inputs = random_inputs(SIZES)
    chosen = torch.randint(Lk, (Lq,))
    mask = torch.nn.functional.one_hot(chosen, Lk).bool()
    out = attn_kd.attention_kl(*inputs, attn_mask=mask, divergence=divergence, backend=backend)
    torch.testing.assert_close(out.output, inputs.value[:, :, chosen], rtol=1e-6, atol=0)
    assert out.kl.abs().max() <= 4e-6  # two LSEs of at most 8 cancel


@every_divergence
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
class TestRowsThatSeeNothing:
    hidden_rows = (0, 17, 63, 64, Lq - 1)

    def mask(self, kind: str) -> Tensor:
        mask = torch.rand(B, 1, Lq, Lk) > 0.3
        mask[:, :, self.hidden_rows] = False
        return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def test_give_zeros(self, backend, kind, divergence, dtype):
        inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
        mask = self.mask(kind)
        actual = run_backend(backend, inputs, cotangents, attn_mask=mask, divergence=divergence)
        for name in ("output", "kl", "grad_query"):
            assert (actual[name][:, :, self.hidden_rows] == 0).all(), name
        assert (actual["lse"][:, :, self.hidden_rows] == -torch.inf).all()
        assert not any(result.isnan().any() for result in actual.values())

    def test_leave_the_others_alone(self, backend, kind, divergence, dtype):
        mask = self.mask(kind)
        check(backend, mask, dtype, divergence=divergence)

    def test_contribute_nothing_to_keys_and_values(self, backend, kind, divergence, dtype):
        inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
        mask = self.mask(kind)
        options = {"attn_mask": mask, "divergence": divergence}
        expected = run_backend(backend, inputs, cotangents, **options)
        other_query = inputs.query.clone()
        other_query[:, :, self.hidden_rows] = torch.randn(B, H, 5, SIZES.D).to(dtype)
        other = inputs._replace(query=other_query)
        actual = run_backend(backend, other, cotangents, **options)
        for name in ("grad_key", "grad_value"):
            assert torch.equal(actual[name], expected[name]), name


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_nothing_visible_anywhere(backend, dtype, divergence):
    inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
    nothing = torch.zeros(1, dtype=torch.bool)
    actual = run_backend(backend, inputs, cotangents, attn_mask=nothing, divergence=divergence)
    assert (actual.pop("lse") == -torch.inf).all()
    assert all((result == 0).all() for result in actual.values())


@every_divergence
def test_hiding_keys_equals_leaving_them_out(backend, divergence):
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    kept = torch.rand(Lk) > 0.5
    masked = run_backend(backend, inputs, cotangents, attn_mask=kept, divergence=divergence)
    fewer = Inputs(
        inputs.query,
        inputs.key[:, :, kept],
        inputs.value[:, :, kept],
        inputs.teacher_query,
        inputs.teacher_key[:, :, kept],
    )
    expected = run_backend(backend, fewer, cotangents, divergence=divergence)
    for name in ("grad_key", "grad_value"):
        assert (masked[name][:, :, ~kept] == 0).all(), name
        masked[name] = masked[name][:, :, kept]
    for name in expected:
        torch.testing.assert_close(masked[name], expected[name])


@every_divergence
@pytest.mark.parametrize("shift", [-900.0, -3.0, 900.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_a_constant_bias_shifts_the_lse_alone(backend, dtype, shift, divergence):
    """Also where every logit of a row is far below or above what its exponential can hold."""
    inputs, cotangents = (make(SIZES, dtype) for make in (random_inputs, random_cotangents))
    expected = run_backend(backend, inputs, cotangents, divergence=divergence)
    bias = torch.full((1,), shift)
    shifted = run_backend(backend, inputs, cotangents, attn_mask=bias, divergence=divergence)
    shifted["lse"] -= shift
    # The bias rounds a float32 logit by up to 3e-5, half a unit of 900.
    tolerance = 1e-10 if dtype == torch.float64 else 5e-4
    for name in expected:
        torch.testing.assert_close(shifted[name], expected[name], rtol=tolerance, atol=tolerance)


@every_divergence
@pytest.mark.parametrize("head_reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_large_bias_beside_rows_that_do_not_exist(backend, dtype, head_reduction, divergence):
    """Lq is odd and no multiple of a block; 100 added to a logit of 0 has no exponential."""
    inputs = random_inputs(SIZES, dtype)
    cotangents = random_cotangents(SIZES, dtype, head_reduction)
    options = {"divergence": divergence, "head_reduction": head_reduction}
    options["attn_mask"] = torch.full((1, 1, 1, Lk), 100.0)
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)
