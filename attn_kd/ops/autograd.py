"""The autograd function over the compiled operators, one operator per direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_kd.ops import autocast, extension, fake
from attn_kd.ops.arguments import Operands, Options


class FusedAttentionKL(torch.autograd.Function):
    """Attention and its divergence from a teacher's attention, by the compiled kernels.

    ``apply(*operands, *options)``, in the order of `attn_kd.ops.arguments`: query, key, value,
    teacher_query, teacher_key, teacher_lse, attn_mask, dropout_seed, scale, teacher_scale,
    divergence, head_reduction, dropout_p. Returns (output, kl, lse, teacher_lse, row_state).
    Shapes and semantics are those of `attn_kd.attention_kl`, but nothing is cast or drawn here.
    Without teacher tensors it is plain attention, and kl and teacher_lse are empty; a teacher_lse
    that was given is not returned again. row_state [3, B, H, Lq] is what backward needs of a row.
    Saves O(Lq) beyond its inputs and output, never a map.

    `attn_kd.attention_kl` does not come by here: the operator differentiates by itself, in C++
    (csrc/autograd.cpp). This is the same in Python, to build upon.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        device = arguments[0].device
        if not autocast.is_enabled(device):
            return torch.ops.attn_kd.attention_kl_forward(*arguments)
        with torch.autocast(device.type, enabled=False):
            return torch.ops.attn_kd.attention_kl_forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        operands = Operands(*inputs[: len(Operands._fields)])
        attention, _, _, own_teacher_lse, row_state = output
        ctx.mark_non_differentiable(own_teacher_lse, row_state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            operands.query,
            operands.key,
            operands.value,
            operands.teacher_query,
            operands.teacher_key,
            operands.attn_mask,
            operands.dropout_seed,
            attention,
            own_teacher_lse if operands.teacher_lse is None else operands.teacher_lse,
            row_state,
        )
        ctx.options = Options(*inputs[len(Operands._fields) :])

    @staticmethod
    @once_differentiable  # differentiating again raises, where it would silently give zeros
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_kl: Tensor | None,
        grad_lse: Tensor | None,
        *_constants: None,
    ) -> tuple[Tensor | None, ...]:
        grads = torch.ops.attn_kd.attention_kl_backward(
            grad_output, grad_kl, grad_lse, *ctx.saved_tensors, *ctx.options
        )
        constants = len(Operands._fields) - len(grads) + len(Options._fields)
        return (*grads, *[None] * constants)


if extension.module is not None:
    fake.register()
