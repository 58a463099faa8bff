"""Autocast casts the student as it casts scaled_dot_product_attention's arguments, and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attn_kd
from attn_kd.ops.arguments import Operands, Options
from tests.ops.cases import (
    Inputs,
    Sizes,
    name_of,
    random_cotangents,
    random_inputs,
    run,
    run_backend,
)

low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)


def autocast_operator(backend: str, dtype: torch.dtype) -> Callable:
    """The operator under autocast in the forward pass alone, as its users run it."""

    def function(*tensors: Tensor) -> attn_kd.AttentionKLOutput:
        with torch.autocast(torch.get_default_device().type, dtype):
            return attn_kd.attention_kl(*tensors, backend=backend)

    return function


@low_precision
def test_equals_casting_by_hand(backend, dtype):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes(), dtype)
    by_hand = Inputs(*(tensor.to(dtype) for tensor in inputs[:3]), *inputs[3:])
    expected = run_backend(backend, by_hand, cotangents)
    actual = run(autocast_operator(backend, dtype), inputs, cotangents)
    assert actual["output"].dtype == dtype
    for name in expected:
        assert torch.equal(actual[name], expected[name].to(actual[name].dtype)), name


@low_precision
def test_gradients_come_back_in_the_dtype_of_the_inputs(backend, dtype):
    function = autocast_operator(backend, dtype)
    grads = run(function, random_inputs(Sizes()), random_cotangents(Sizes(), dtype))
    assert {grads[f"grad_{name}"].dtype for name in ("query", "key", "value")} == {torch.float32}


def test_logits_are_not_rounded(backend):
    """The divergence is that of the rounded inputs to float32 precision, not to bfloat16's."""
    inputs = random_inputs(Sizes(), torch.bfloat16)
    expected = attn_kd.attention_kl(*inputs.to(torch.float32), backend=backend)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = attn_kd.attention_kl(*inputs.to(torch.float32), backend=backend)
    torch.testing.assert_close(actual.kl, expected.kl)
    torch.testing.assert_close(actual.lse, expected.lse)


def test_float64_is_left_alone(backend):
    inputs = random_inputs(Sizes(), torch.float64)
    expected = attn_kd.attention_kl(*inputs, backend=backend)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = attn_kd.attention_kl(*inputs, backend=backend)
    assert torch.equal(actual.output, expected.output) and actual.kl.dtype == torch.float64


def test_dtypes_that_autocast_makes_one(backend):
    """A float32 query beside bfloat16 keys is what a model under autocast may hand over."""
    inputs = random_inputs(Sizes())
    mixed = inputs._replace(key=inputs.key.bfloat16(), value=inputs.value.bfloat16())
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = attn_kd.attention_kl(*mixed, backend=backend)
        expected = attn_kd.attention_kl(*inputs, backend=backend)
    assert torch.equal(actual.output, expected.output)


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@low_precision
def test_of_the_operator_itself(backend, dtype):
    """torch.ops.attn_kd casts as the public functions do, and nothing of the teacher."""
    inputs = random_inputs(Sizes())
    prefix = "triton_" if backend == "triton" else ""
    operator = getattr(torch.ops.attn_kd, f"{prefix}attention_kl_forward")
    with torch.autocast(torch.get_default_device().type, dtype):
        results = operator(*Operands(*inputs), *Options())
        expected = attn_kd.attention_kl(*inputs, backend=backend)
    assert results[0].dtype == dtype
    for actual, wanted in zip(results[:3], expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_python_function_casts_nothing(cpu_backend):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            return attn_kd.FusedAttentionKL.apply(*Operands(*tensors), *Options())[:3]

    expected = run_backend(cpu_backend, inputs, cotangents)
    for name, actual in run(function, inputs, cotangents).items():
        assert torch.equal(actual, expected[name]), name
