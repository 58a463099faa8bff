"""Weights of query rows: they multiply the divergence, and may be learned."""

from __future__ import annotations

import pytest
import torch

import attn_kd
from tests.ops.cases import (
    HEAD_REDUCTIONS,
    Sizes,
    assert_as_accurate_as_eager,
    random_cotangents,
    random_inputs,
    run_backend,
)

SIZES = Sizes(Lq=70, Lk=40)
B, H, Lq = SIZES.B, SIZES.H, SIZES.Lq

SHAPES = {
    "none": {"[B, H, Lq]": (B, H, Lq), "[B, 1, Lq]": (B, 1, Lq), "[Lq]": (Lq,), "[]": ()},
    "mean": {"[B, Lq]": (B, Lq), "[Lq]": (Lq,), "[B, 1]": (B, 1)},
}
CASES = [
    pytest.param(head_reduction, shape, id=f"{head_reduction}-{name}")
    for head_reduction, shapes in SHAPES.items()
    for name, shape in shapes.items()
]


@pytest.mark.parametrize(("head_reduction", "shape"), CASES)
def test_values_and_gradients(backend, head_reduction, shape):
    inputs = random_inputs(SIZES)
    cotangents = random_cotangents(SIZES, head_reduction=head_reduction)
    options = {"head_reduction": head_reduction, "row_weights": torch.rand(shape)}
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
def test_gradient_of_the_weights_is_the_divergence(backend, head_reduction):
    inputs = random_inputs(SIZES)
    options = {"head_reduction": head_reduction, "backend": backend}
    weights = torch.rand(Lq, requires_grad=True)
    kl = attn_kd.attention_kl(*inputs, **options).kl
    weighted = attn_kd.attention_kl(*inputs, row_weights=weights, **options).kl
    torch.testing.assert_close(weighted, kl * weights)
    weighted.sum().backward()
    torch.testing.assert_close(weights.grad, kl.flatten(0, -2).sum(0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64])
def test_dtype_of_the_divergence_stays(backend, dtype):
    weights = (torch.rand(Lq) > 0.5).to(dtype)
    inputs = random_inputs(SIZES)
    kl = attn_kd.attention_kl(*inputs, backend=backend).kl
    weighted = attn_kd.attention_kl(*inputs, row_weights=weights, backend=backend).kl
    assert weighted.dtype == torch.float32
    torch.testing.assert_close(weighted, kl * weights.float())


def test_of_the_divergence_alone(backend):
    query, key, _, teacher_query, teacher_key = random_inputs(SIZES)
    weights = torch.rand(B, 1, Lq)
    tensors = (query, key, teacher_query, teacher_key)
    kl = attn_kd.attention_kl_div(*tensors, backend=backend).kl
    weighted = attn_kd.attention_kl_div(*tensors, row_weights=weights, backend=backend).kl
    torch.testing.assert_close(weighted, kl * weights)


def test_false_leaves_a_row_out_even_where_it_is_nan(backend):
    query, *tensors = (torch.randn(1, 2, 5, 4) for _ in range(5))
    query[:, :, 3] = torch.nan
    rows = torch.tensor([True, True, True, False, True])
    kl = attn_kd.attention_kl(query, *tensors, row_weights=rows, backend=backend).kl
    assert (kl[:, :, 3] == 0).all() and kl.isfinite().all()
