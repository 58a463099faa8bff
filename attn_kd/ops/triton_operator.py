"""The operators of the `triton` backend: their definition, fake kernels and launches.

Schemas, results and errors are those of the compiled operators (csrc/library.cpp), but that
backward can be told which gradients to leave out; the compiled extension is not needed. Importing
this module does not import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.ops import fake, triton_autograd, triton_installation
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import interprets_triton, machine_refusal
from attn_kd.ops.triton_layouts import check_device, check_shape
from attn_kd.ops.triton_problem import Problem, in_reach, make_problem, row_values, writable

# As in csrc/library.cpp; tests/ops/test_triton_operator.py compares the two.
FORWARD_SCHEMA = (
    "triton_attention_kl_forward"
    "(Tensor query, Tensor key, Tensor value, Tensor? teacher_query, "
    "Tensor? teacher_key, Tensor? teacher_lse, Tensor? attn_mask, Tensor? dropout_seed, "
    "float? scale, float? teacher_scale, str divergence, str head_reduction, float dropout_p) -> "
    "(Tensor output, Tensor kl, Tensor lse, Tensor teacher_lse, Tensor row_state)"
)
# output_mask says which of the gradients are wanted; the others come back empty.
BACKWARD_SCHEMA = (
    "triton_attention_kl_backward"
    "(Tensor? grad_output, Tensor? grad_kl, Tensor? grad_lse, "
    "Tensor query, Tensor key, Tensor value, Tensor? teacher_query, Tensor? teacher_key, "
    "Tensor? attn_mask, Tensor? dropout_seed, Tensor output, Tensor? teacher_lse, "
    "Tensor row_state, float? scale, float? teacher_scale, str divergence, str head_reduction, "
    "float dropout_p, *, bool[3] output_mask=[True, True, True]) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def forward(*arguments: Any) -> Results:
    """The forward operator on tensors of a GPU, or of the CPU where Triton interprets."""
    operands = Operands(*arguments[: len(Operands._fields)])
    options = Options(*arguments[len(Operands._fields) :])
    query = operands.query
    _check_device(query)
    problem = make_problem(operands, options)
    output, kl, lse, own_teacher_lse, state = (
        torch.empty_strided(shape, strides, dtype=dtype, device=query.device)
        for shape, strides, dtype in problem.facts.results
    )
    written = writable(output)
    with _device_of(query):
        if problem.facts.two_pass:
            from attn_kd.ops.triton_two_pass import two_pass_forward

            two_pass_forward(problem, written, kl, lse, own_teacher_lse, state)
        else:
            from attn_kd.ops.triton_launch import forward_launch

            computed = own_teacher_lse if own_teacher_lse.numel() else None
            forward_launch(problem, written, kl, lse, computed, None, state).run()
        if written is not output:
            output.copy_(written)
    return output, kl, lse, own_teacher_lse, state


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
    output_mask: tuple[bool, ...] = (True, True, True),
) -> Gradients:
    """The backward operator likewise."""
    _check_device(query)
    # Without a gradient of the divergence, or with an empty one, it is that of plain attention.
    if grad_kl is not None and grad_kl.shape == (0,):
        grad_kl = None
    teacher = (teacher_query, teacher_key, teacher_lse) if grad_kl is not None else (None,) * 3
    operands = Operands(query, key, value, *teacher, attn_mask, dropout_seed)
    problem = make_problem(operands, Options(*options))
    arriving = _arriving(problem, grad_output, grad_kl, grad_lse, output, row_state)
    grads = fake.gradients(query, key, value, output_mask)
    written = _written(problem, arriving, grads, output_mask)
    with _device_of(query):
        if problem.facts.two_pass:
            from attn_kd.ops.triton_two_pass import two_pass_backward

            two_pass_backward(problem, arriving, *written)
        else:
            from attn_kd.ops.triton_launch import backward_launches

            constants = torch.empty_like(arriving.row_state)
            for launch in backward_launches(problem, arriving, constants, *written):
                launch.run()
        for grad, result, is_wanted in zip(grads, written, output_mask, strict=True):
            if not is_wanted:
                continue
            if result is None:
                grad.zero_()
            elif result is not grad:
                grad.copy_(result)
    return grads


def _written(
    problem: Problem, arriving: Any, grads: Gradients, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where kernels write the gradients: in place, or into scratches where they are out of reach.

    Those of key and value come from one kernel, so that either alone takes a scratch for the other.
    None is not computed: without a gradient of the output that of the value is zero.
    """
    query, key, value, *_ = problem.operands
    of_query, of_key, of_value = wanted
    of_value = of_value and arriving.grad_output is not None
    of_keys = of_key or of_value
    computed = (of_query, of_keys, of_keys and arriving.grad_output is not None)
    grad_query, grad_key, grad_value = (
        None if not is_computed else writable(grad if is_wanted else torch.empty_like(tensor))
        for tensor, grad, is_wanted, is_computed in zip(
            (query, key, value), grads, wanted, computed, strict=True
        )
    )
    return grad_query, grad_key, grad_value


def _arriving(
    problem: Problem,
    grad_output: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    row_state: Tensor,
) -> Any:
    """What the forward pass left and what arrives at it, checked."""
    from attn_kd.ops.triton_launch import Arriving

    operands, facts = problem.operands, problem.facts
    query = operands.query
    if facts.divergence == "none":
        grad_kl = None
    elif operands.teacher_lse is None:
        raise InputError("teacher_lse is missing beside grad_kl")
    rows = tuple(query.shape[:3])
    state = row_values(row_state, (3, *rows), query)
    if state is None:
        raise InputError("row_state is empty")
    if grad_output is not None:
        for name, tensor in (("output", output), ("grad_output", grad_output)):
            check_shape(name, tensor, (*rows, facts.value_dim))
            check_device(name, tensor, query)
    if grad_output is not None and facts.value_dim:
        grad_output = in_reach(grad_output.to(query.dtype))
    else:
        grad_output = None
    return Arriving(
        grad_output,
        row_values(grad_kl, facts.kl_shape, query),
        row_values(grad_lse, rows, query),
        in_reach(output),
        operands.teacher_lse,
        state,
    )


def _fake_backward(
    *arguments: Any, output_mask: tuple[bool, ...] = (True, True, True)
) -> Gradients:
    query, key, value = arguments[3:6]
    return fake.gradients(query, key, value, output_mask)


def _check_device(query: Tensor) -> None:
    """Refuse what no kernel can read; tensors without data may describe a launch."""
    device = query.device
    if device.type not in ("cuda", "meta") and not interprets_triton():
        raise InputError(
            f"query is on {device}, expected a CUDA device: Triton runs elsewhere only where "
            "TRITON_INTERPRET=1 is set"
        )
    if device.type == "meta":
        reason = triton_installation.missing_reason()
    else:
        reason = machine_refusal("triton", device.type, device.index)
    if reason is not None:
        raise InputError(f"the Triton kernels cannot run here: {reason}")


def _device_of(tensor: Tensor) -> Any:
    """A context in which launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _define() -> torch.library.Library:
    library = torch.library.Library("attn_kd", "FRAGMENT")
    kernels: dict[str, tuple[Callable[..., Any], ...]] = {
        FORWARD_SCHEMA: (forward, fake.attention_kl_forward, triton_autograd.forward),
        BACKWARD_SCHEMA: (backward, _fake_backward, triton_autograd.backward),
    }
    for schema, (of_device, of_fakes, of_autograd) in kernels.items():
        name = schema.partition("(")[0]
        library.define(schema)
        for dispatch_key in ("CPU", "CUDA"):
            library.impl(name, of_device, dispatch_key)
        library.impl(name, of_autograd, "Autograd")
        torch.library.register_fake(f"attn_kd::{name}", of_fakes, lib=library)
    for device_type in ("cpu", "cuda"):
        dispatch_key = triton_autograd.autocast_key(device_type)
        cast = triton_autograd.casting(device_type)
        library.impl("triton_attention_kl_forward", cast, dispatch_key)
    return library


_library = _define()  # unregisters what it has where it is collected

forward_operator = torch.ops.attn_kd.triton_attention_kl_forward
backward_operator = torch.ops.attn_kd.triton_attention_kl_backward
