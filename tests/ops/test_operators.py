"""The operators as torch.ops.attn_kd offers them: torch.library.opcheck, and their own checks."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import Sizes, random_cotangents, random_inputs
from tests.ops.layouts import every_other_column, heads_after_length

pytestmark = pytest.mark.usefixtures("cpu_backend")

SIZES = Sizes(B=2, H=2, Lq=5, Lk=7, D=4, Dv=3, Dt=6)


def forward_arguments(kind: str, dtype: torch.dtype, divergence: str) -> tuple:
    """Arguments of attention_kl_forward."""
    query, key, value, *teacher = random_inputs(SIZES, dtype)
    teacher_lse = mask = None
    if kind == "attention":
        teacher = [None, None]
    if kind == "teacher_lse":
        teacher_lse = torch.randn(SIZES.B, SIZES.H, SIZES.Lq)
    if kind == "mask":
        mask = (torch.rand(SIZES.B, 1, 1, SIZES.Lk) > 0.3).expand(2, 2, SIZES.Lq, SIZES.Lk)
    if kind == "views":
        query, key = heads_after_length(query), every_other_column(key)
    return (query, key, value, *teacher, teacher_lse, mask, 0.5, 0.4, divergence)


def backward_arguments(kind: str, dtype: torch.dtype, divergence: str) -> tuple:
    """Arguments of attention_kl_backward, with cotangents of everything but the LSE."""
    inputs = forward_arguments(kind, dtype, divergence)
    output, kl, lse, own_teacher_lse = torch.ops.attn_kd.attention_kl_forward(*inputs)
    *tensors, given_teacher_lse, mask, scale, teacher_scale, _ = inputs
    grad_output, grad_kl, _ = random_cotangents(SIZES, dtype)
    grads = (grad_output, None if kind == "attention" else grad_kl.to(kl.dtype), None)
    teacher_lse = own_teacher_lse if given_teacher_lse is None else given_teacher_lse
    saved = (mask, output, kl, lse, teacher_lse)
    return (*grads, *tensors, *saved, scale, teacher_scale, divergence)


every_kind = pytest.mark.parametrize(
    "kind", ["attention", "teacher", "teacher_lse", "mask", "views"]
)


@every_kind
def test_opcheck_of_forward(kind):
    arguments = forward_arguments(kind, torch.float32, "reverse_kl")
    for tensor in arguments[:3]:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.attn_kd.attention_kl_forward.default, arguments)


@every_kind
def test_opcheck_of_backward(kind):
    arguments = backward_arguments(kind, torch.float32, "forward_kl")
    torch.library.opcheck(torch.ops.attn_kd.attention_kl_backward.default, arguments)


def test_opcheck_of_16_bit_inputs():
    arguments = (torch.bfloat16, "reverse_kl")
    forward, backward = (
        make("teacher", *arguments) for make in (forward_arguments, backward_arguments)
    )
    torch.library.opcheck(torch.ops.attn_kd.attention_kl_forward.default, forward)
    torch.library.opcheck(torch.ops.attn_kd.attention_kl_backward.default, backward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 5, 4)}, "4 dimensions"),
        ({1: torch.zeros(2, 2, 7, 5)}, "key has shape"),
        ({2: torch.zeros(2, 2, 6, 3)}, "value has shape"),
        ({3: None}, "teacher_query and teacher_key"),
        ({4: torch.zeros(2, 2, 6, 6)}, "teacher_key has shape"),
        ({5: torch.zeros(2, 2, 6)}, "per-row tensor"),
        ({6: torch.zeros(5, 7)}, "attn_mask has shape"),
        ({9: "js"}, "js"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_that_would_be_read_past_their_end_are_refused(change, message):
    arguments = list(forward_arguments("teacher", torch.float32, "reverse_kl"))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.attn_kd.attention_kl_forward(*arguments)


@pytest.mark.parametrize("position", range(3))
def test_dtypes_that_differ_are_refused(position):
    arguments = list(forward_arguments("teacher", torch.float32, "reverse_kl"))
    arguments[position] = arguments[position].double()
    with pytest.raises(TypeError, match="one dtype"):
        torch.ops.attn_kd.attention_kl_forward(*arguments)
