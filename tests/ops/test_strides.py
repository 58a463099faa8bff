"""Inputs and cotangents of any memory layout give the results of contiguous ones, bit for bit."""

from __future__ import annotations

import pytest
import torch

import attn_kd
from tests.ops.cases import (
    Cotangents,
    Inputs,
    Results,
    Sizes,
    assert_equal,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)
from tests.ops.layouts import LAYOUTS, heads_after_length

SIZES = Sizes(Lq=70, Lk=50)

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)


def assert_same(backend: str, actual: Results, expected: Results) -> None:
    """Bit for bit by the compiled kernels; others order their sums as the layout suggests."""
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])
    if backend == "cpu":
        assert_equal(actual, expected)


@every_layout
@every_dtype
@pytest.mark.parametrize("name", Inputs._fields)
def test_of_an_input(backend, name, layout, dtype):
    inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
    expected = run_backend(backend, inputs, cotangents)
    laid_out = inputs._replace(**{name: layout(getattr(inputs, name))})
    assert_same(backend, run_backend(backend, laid_out, cotangents), expected)


@every_layout
@every_dtype
def test_of_all_inputs_and_cotangents(backend, layout, dtype):
    inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
    expected = run_backend(backend, inputs, cotangents)
    laid_out = Inputs(*(layout(tensor) for tensor in inputs))
    output, kl, lse = cotangents
    cotangents = Cotangents(layout(output), layout(kl[..., None])[..., 0], lse.mT.contiguous().mT)
    assert_same(backend, run_backend(backend, laid_out, cotangents), expected)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "heads", "rows"])
@pytest.mark.parametrize("name", Inputs._fields)
def test_expanded_input(backend, name, dim):
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    tensor = getattr(inputs, name)
    expanded = tensor.narrow(dim, 0, 1).expand(tensor.shape)
    actual = run_backend(backend, inputs._replace(**{name: expanded}), cotangents)
    expected = run_backend(backend, inputs._replace(**{name: expanded.contiguous()}), cotangents)
    for result in expected:
        torch.testing.assert_close(actual[result], expected[result])


def test_expanded_cotangents(backend):
    """What sum() and mean() send back has stride 0 throughout."""
    inputs = random_inputs(SIZES)
    ones = [torch.ones(1).expand(c.shape) for c in random_cotangents(SIZES)]
    actual = run_backend(backend, inputs, Cotangents(*ones))
    expected = run_backend(backend, inputs, Cotangents(*(c.contiguous() for c in ones)))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_one_tensor_for_everything(backend):
    x = torch.randn(2, 3, 20, 8)
    shared, separate = Inputs(x, x, x, x, x), Inputs(*(x.clone() for _ in range(5)))
    cotangents = random_cotangents(Sizes(Lq=20, Lk=20, D=8, Dv=8, Dt=8))
    assert_equal(
        run_backend(backend, shared, cotangents), run_backend(backend, separate, cotangents)
    )


def test_teacher_lse_of_any_layout(backend):
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    lse = attn_kd.attention(inputs.teacher_query, inputs.teacher_key, inputs.value).lse
    laid_out = heads_after_length(lse[..., None])[..., 0]
    assert not laid_out.is_contiguous()
    assert_equal(
        run_backend(backend, inputs, cotangents, teacher_lse=laid_out),
        run_backend(backend, inputs, cotangents, teacher_lse=lse),
    )


@every_layout
def test_inputs_are_not_written_to(backend, layout):
    inputs = Inputs(*(layout(tensor) for tensor in random_inputs(SIZES)))
    cotangents = random_cotangents(SIZES)
    mask = torch.randn(SIZES.Lq, SIZES.Lk)
    given = [*inputs, *cotangents, mask]
    before = [tensor.clone() for tensor in given]
    run_backend(backend, inputs, cotangents, attn_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


by_kernels = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)


@by_kernels
def test_output_can_be_merged_over_heads_without_a_copy(backend):
    output = attn_kd.attention_kl(*random_inputs(SIZES), backend=backend).output
    assert output.transpose(1, 2).is_contiguous()


@by_kernels
def test_gradients_have_the_layout_of_their_inputs(backend):
    inputs = Inputs(*(heads_after_length(tensor) for tensor in random_inputs(SIZES)))
    grads = run_backend(backend, inputs, random_cotangents(SIZES))
    for name in ("query", "key", "value"):
        assert grads[f"grad_{name}"].stride() == getattr(inputs, name).stride()
