"""The operators of the `triton` backend: their definition, fake kernels, autograd and launches.

Schemas, results and errors are those of the compiled operators (csrc/library.cpp); the compiled
extension is not needed. Importing this module does not import Triton.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.ops import fake
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.autograd import FusedAttentionKL
from attn_kd.ops.backends import interprets_triton
from attn_kd.ops.triton_problem import Problem, check_shape, in_reach, make_problem, row_values

FORWARD = "attn_kd::triton_attention_kl_forward"
BACKWARD = "attn_kd::triton_attention_kl_backward"

# As in csrc/library.cpp; tests/ops/test_triton_operator.py compares the two.
FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? teacher_query, "
    "Tensor? teacher_key, Tensor? teacher_lse, Tensor? attn_mask, Tensor? dropout_seed, "
    "float? scale, float? teacher_scale, str divergence, str head_reduction, float dropout_p) -> "
    "(Tensor output, Tensor kl, Tensor lse, Tensor teacher_lse, Tensor row_state)"
)
BACKWARD_SCHEMA = (
    "(Tensor? grad_output, Tensor? grad_kl, Tensor? grad_lse, "
    "Tensor query, Tensor key, Tensor value, Tensor? teacher_query, Tensor? teacher_key, "
    "Tensor? attn_mask, Tensor? dropout_seed, Tensor output, Tensor? teacher_lse, "
    "Tensor row_state, float? scale, float? teacher_scale, str divergence, str head_reduction, "
    "float dropout_p) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def forward(*arguments: Any) -> Results:
    """The forward operator on tensors of a GPU, or of the CPU where Triton interprets."""
    operands = Operands(*arguments[: len(Operands._fields)])
    options = Options(*arguments[len(Operands._fields) :])
    _check_device(operands.query)
    problem = make_problem(operands, options)
    # Allocated as tracing says, and filled in.
    results = fake.attention_kl_forward(*arguments)
    with _device_of(operands.query):
        if problem.two_pass:
            from attn_kd.ops.triton_two_pass import two_pass_forward

            two_pass_forward(problem, *results)
        else:
            _one_pass_forward(problem, *results)
    return results


def _one_pass_forward(
    problem: Problem, output: Tensor, kl: Tensor, lse: Tensor, teacher_lse: Tensor, state: Tensor
) -> None:
    from attn_kd.ops.triton_launch import forward_launch

    own_lse = teacher_lse if teacher_lse.numel() else None
    forward_launch(problem, output, kl, lse, own_lse, None, state).run()


def backward(
    grad_output: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor | None,
    teacher_key: Tensor | None,
    attn_mask: Tensor | None,
    dropout_seed: Tensor | None,
    output: Tensor,
    teacher_lse: Tensor | None,
    row_state: Tensor,
    *options: Any,
) -> Gradients:
    """The backward operator likewise."""
    from attn_kd.ops.triton_launch import Arriving

    _check_device(query)
    # Without a gradient of the divergence this is plain attention's backward.
    teacher = (teacher_query, teacher_key, teacher_lse) if grad_kl is not None else (None,) * 3
    operands = Operands(query, key, value, *teacher, attn_mask, dropout_seed)
    problem = make_problem(operands, Options(*options))
    if problem.divergence != "none" and teacher_lse is None:
        raise InputError("teacher_lse is missing beside grad_kl")
    rows = tuple(query.shape[:3])
    state = row_values(row_state, (3, *rows), query)
    if state is None:
        raise InputError("row_state is empty")
    if problem.divergence == "none":
        grad_kl = None
    if value.shape[3] == 0:
        grad_output = None
    if grad_output is not None:
        for name, tensor in (("output", output), ("grad_output", grad_output)):
            check_shape(name, tensor, (*rows, value.shape[3]), query)
        grad_output = grad_output.to(query.dtype)
    arriving = Arriving(
        grad_output if grad_output is None else in_reach(grad_output),
        row_values(grad_kl, problem.kl_shape, query),
        row_values(grad_lse, rows, query),
        in_reach(output),
        problem.operands.teacher_lse,
        state,
    )
    grads = fake.attention_kl_backward(None, None, None, query, key, value)
    if grad_output is None:
        grads[2].zero_()
    with _device_of(query):
        if problem.two_pass:
            from attn_kd.ops.triton_two_pass import two_pass_backward

            two_pass_backward(problem, arriving, *grads)
        else:
            _one_pass_backward(problem, arriving, *grads)
    return grads


def _one_pass_backward(problem: Problem, arriving: Any, *grads: Tensor) -> None:
    from attn_kd.ops.triton_launch import backward_launches

    constants = torch.empty_like(arriving.row_state)
    for launch in backward_launches(problem, arriving, constants, *grads):
        launch.run()


def _check_device(query: Tensor) -> None:
    """Refuse what no kernel can read; tensors without data may describe a launch."""
    if query.device.type not in ("cuda", "meta") and not interprets_triton():
        raise InputError(
            f"query is on {query.device}, expected a CUDA device: Triton runs elsewhere only where "
            "TRITON_INTERPRET=1 is set"
        )


def _device_of(tensor: Tensor) -> Any:
    """A context in which launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    of_inputs = backward_operator(*grads[:3], *ctx.saved_tensors, *ctx.options)
    constants = len(Operands._fields) - len(of_inputs) + len(Options._fields)
    return (*of_inputs, *[None] * constants)


def _refuse(_ctx: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Without this the gradient's own derivative would silently be zero.
    raise RuntimeError(f"the derivative of {BACKWARD} is not implemented")


def _keep_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
    pass


def _define() -> None:
    torch.library.define(FORWARD, FORWARD_SCHEMA)
    torch.library.define(BACKWARD, BACKWARD_SCHEMA)
    torch.library.register_fake(FORWARD, fake.attention_kl_forward)
    torch.library.register_fake(BACKWARD, fake.attention_kl_backward)
    torch.library.impl(FORWARD, ("cpu", "cuda"), forward)
    torch.library.impl(BACKWARD, ("cpu", "cuda"), backward)
    torch.library.register_autograd(
        FORWARD, _differentiate, setup_context=FusedAttentionKL.setup_context
    )
    torch.library.register_autograd(BACKWARD, _refuse, setup_context=_keep_nothing)


_define()

forward_operator = torch.ops.attn_kd.triton_attention_kl_forward
backward_operator = torch.ops.attn_kd.triton_attention_kl_backward
