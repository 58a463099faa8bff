"""The operators as torch.ops.attn_kd offers them: torch.library.opcheck, and their own checks."""

from __future__ import annotations

import pytest
import torch

from attn_kd.ops.arguments import Operands, Options
from tests.ops.cases import (
    DIVERGENCES,
    HEAD_REDUCTIONS,
    Sizes,
    random_cotangents,
    random_inputs,
)
from tests.ops.layouts import every_other_column, heads_after_length

pytestmark = pytest.mark.usefixtures("cpu_backend")

SIZES = Sizes(B=2, H=2, Lq=5, Lk=7, D=4, Dv=3, Dt=6)


MASKS = {
    "key padding": lambda: torch.rand(SIZES.B, 1, 1, SIZES.Lk) > 0.3,
    "expanded": lambda: (torch.rand(SIZES.B, 1, 1, SIZES.Lk) > 0.3).expand(2, 2, 5, 7),
    "additive": lambda: torch.randn(SIZES.Lq, SIZES.Lk),
}
KINDS = (
    "attention",
    "teacher",
    "teacher_lse",
    "views",
    "dropout",
    "grouped",
    "other teacher heads",
    *MASKS,
)


def forward_arguments(kind: str, options: Options, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of attention_kl_forward."""
    sizes = SIZES._replace(G=3 if kind == "grouped" else 1)
    if kind == "other teacher heads":
        sizes, options = sizes._replace(Ht=3), options._replace(head_reduction="mean")
    operands = Operands(*random_inputs(sizes, dtype))
    if kind == "attention":
        operands = Operands(*operands[:3])
    if kind == "teacher_lse":
        operands = operands._replace(teacher_lse=torch.randn(SIZES.B, SIZES.H, SIZES.Lq))
    if kind == "views":
        query, key = heads_after_length(operands.query), every_other_column(operands.key)
        operands = operands._replace(query=query, key=key)
    if kind == "dropout":
        operands = operands._replace(dropout_seed=torch.tensor([1, 2]))
        options = options._replace(dropout_p=0.4)
    if kind in MASKS:
        operands = operands._replace(attn_mask=MASKS[kind]())
    return (*operands, *options)


def backward_arguments(kind: str, options: Options, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of attention_kl_backward, with cotangents of everything but the LSE."""
    inputs = forward_arguments(kind, options, dtype)
    operands, options = Operands(*inputs[:8]), Options(*inputs[8:])
    output, kl, _, own_teacher_lse, row_state = torch.ops.attn_kd.attention_kl_forward(*inputs)
    grad_output, grad_kl, _ = random_cotangents(SIZES, dtype, options.head_reduction)
    grads = (grad_output, None if kind == "attention" else grad_kl.to(kl.dtype), None)
    teacher_lse = own_teacher_lse if operands.teacher_lse is None else operands.teacher_lse
    saved = (operands.attn_mask, operands.dropout_seed, output, teacher_lse, row_state)
    return (*grads, *operands[:5], *saved, *options)


every_kind = pytest.mark.parametrize("kind", KINDS)
every_mode = pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            Options(0.5, 0.4, divergence, head_reduction), id=f"{divergence}-{head_reduction}"
        )
        for divergence in DIVERGENCES
        for head_reduction in HEAD_REDUCTIONS
    ],
)

opcheck = torch.library.opcheck


def check_forward(arguments: tuple) -> None:
    for tensor in arguments[:3]:
        tensor.requires_grad_()
    opcheck(torch.ops.attn_kd.attention_kl_forward.default, arguments)


def check_backward(arguments: tuple) -> None:
    opcheck(torch.ops.attn_kd.attention_kl_backward.default, arguments)


@every_kind
def test_opcheck_of_forward(kind):
    check_forward(forward_arguments(kind, Options()))


@every_kind
def test_opcheck_of_backward(kind):
    check_backward(backward_arguments(kind, Options(divergence="forward_kl")))


@every_mode
def test_opcheck_of_every_divergence(options):
    check_forward(forward_arguments("key padding", options))
    check_backward(backward_arguments("key padding", options))


def test_opcheck_of_16_bit_inputs():
    check_forward(forward_arguments("teacher", Options(), torch.bfloat16))
    check_backward(backward_arguments("teacher", Options(), torch.bfloat16))


# Changes to the arguments of a call by position, and what is said of them.
REFUSED = [
    ({0: torch.zeros(2, 5, 4)}, "4 dimensions"),
    ({1: torch.zeros(2, 2, 7, 5)}, "key has shape"),
    ({2: torch.zeros(2, 2, 6, 3)}, "value has shape"),
    ({3: None}, "teacher_query and teacher_key"),
    ({4: torch.zeros(2, 2, 6, 6)}, "teacher_key has shape"),
    ({5: torch.zeros(2, 2, 6)}, "per-row tensor"),
    ({6: torch.zeros(5, 6)}, "attn_mask has shape"),
    ({7: torch.zeros(2), 12: 0.5}, "dropout_seed"),
    ({12: 0.5}, "dropout_seed"),
    ({12: 1.0}, "dropout_p"),
    ({8: float("nan")}, "scale is nan"),
    ({10: "kl"}, "divergence 'kl'"),
    ({11: "sum"}, "head_reduction 'sum'"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    REFUSED,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_that_would_be_read_past_their_end_are_refused(change, message):
    arguments = list(forward_arguments("teacher", Options()))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.attn_kd.attention_kl_forward(*arguments)


@pytest.mark.parametrize("position", range(3))
def test_dtypes_that_differ_are_refused(position):
    arguments = list(forward_arguments("teacher", Options()))
    arguments[position] = arguments[position].double()
    with pytest.raises(TypeError, match="one dtype"):
        torch.ops.attn_kd.attention_kl_forward(*arguments)
