"""Shape, dtype and stride rules of the compiled operators, for tracing without data."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Register the rules; the operators must have been defined."""
    torch.library.register_fake("attn_kd::attention_kl_forward", _attention_kl_forward)
    torch.library.register_fake("attn_kd::attention_kl_backward", _attention_kl_backward)


def _attention_kl_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor | None,
    teacher_key: Tensor | None,
    teacher_lse: Tensor | None,
    attn_mask: Tensor | None,
    scale: float,
    teacher_scale: float,
    divergence: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty((batch, rows, heads, value.shape[3])).transpose(1, 2)
    lse = query.new_empty((batch, heads, rows), dtype=dtype)
    kl = query.new_empty((0,), dtype=dtype) if teacher_query is None else torch.empty_like(lse)
    computed = teacher_query is not None and teacher_lse is None
    own_teacher_lse = torch.empty_like(lse) if computed else query.new_empty((0,), dtype=dtype)
    return output, kl, lse, own_teacher_lse


def _attention_kl_backward(
    grad_output: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grad(query), _empty_grad(key), _empty_grad(value)


def _empty_grad(tensor: Tensor) -> Tensor:
    grad = torch.empty_like(tensor)
    if grad.stride(3) == 1 or grad.shape[3] <= 1:
        return grad
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
