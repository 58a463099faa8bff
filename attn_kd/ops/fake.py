"""Shape, dtype and stride rules of the compiled operators, for tracing without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.ops.arguments import Operands, Options


def register() -> None:
    """Register the rules of the compiled operators, which must have been defined."""
    torch.library.register_fake("attn_kd::attention_kl_forward", attention_kl_forward)
    torch.library.register_fake("attn_kd::attention_kl_backward", attention_kl_backward)


def attention_kl_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = Operands(*arguments[: len(Operands._fields)])
    options = Options(*arguments[len(Operands._fields) :])
    query, _, value, teacher_query, *_ = operands
    _check_devices(operands)
    batch, heads, rows, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)

    def per_row(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    kl, own_teacher_lse = per_row(0), per_row(0)
    if teacher_query is not None:
        averaged = options.head_reduction == "mean"
        kl = per_row(batch, rows) if averaged else per_row(batch, heads, rows)
        if operands.teacher_lse is None:
            own_teacher_lse = per_row(batch, teacher_query.shape[1], rows)
    output = query.new_empty((batch, rows, heads, value.shape[3])).transpose(1, 2)
    lse, row_state = per_row(batch, heads, rows), per_row(3, batch, heads, rows)
    return output, kl, lse, own_teacher_lse, row_state


def _check_devices(operands: Operands) -> None:
    """Tensors of the meta device among real ones arrive here, not at the kernels."""
    for name, tensor in operands._asdict().items():
        if tensor is not None and tensor.device != operands.query.device:
            raise InputError(
                f"{name} is on {tensor.device} but query is on {operands.query.device}"
            )


def attention_kl_backward(
    grad_output: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(query, key, value, (True, True, True))


def gradients(
    query: Tensor, key: Tensor, value: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to be filled in, laid out as their tensors; those not wanted are empty."""
    of_query, of_key, of_value = (
        _empty_grad(tensor) if is_wanted else tensor.new_empty(0)
        for tensor, is_wanted in zip((query, key, value), wanted, strict=True)
    )
    return of_query, of_key, of_value


def _empty_grad(tensor: Tensor) -> Tensor:
    grad = torch.empty_like(tensor)
    if grad.stride(3) == 1 or grad.shape[3] <= 1:
        return grad
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
