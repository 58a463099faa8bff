"""The autograd function over the operators, one operator per direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_kd.ops import autocast, extension, fake
from attn_kd.ops.arguments import Operands, Options


class FusedAttentionKL(torch.autograd.Function):
    """Attention and its divergence from a teacher's attention, by the kernels of the device.

    ``apply(*operands, *options)``, in the order of `attn_kd.ops.arguments`: query, key, value,
    teacher_query, teacher_key, teacher_lse, attn_mask, dropout_seed, scale, teacher_scale,
    divergence, head_reduction, dropout_p. Returns (output, kl, lse, teacher_lse, row_state).
    Shapes and semantics are those of `attn_kd.attention_kl`, but nothing is cast or drawn here.
    Without teacher tensors it is plain attention, and kl and teacher_lse are empty; a teacher_lse
    that was given is not returned again. row_state [3, B, H, Lq] is what backward needs of a row.
    Saves O(Lq) beyond its inputs and output, never a map.

    Tensors of a CUDA device go to the Triton operators, others to the compiled ones.
    `attn_kd.attention_kl` does not come by here: the operators differentiate by themselves
    (csrc/autograd.cpp, attn_kd/ops/triton_autograd.py). This is the same, to build upon.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        device = arguments[0].device
        operator = _operator("forward", device)
        if not autocast.is_enabled(device):
            return operator(*arguments)
        with torch.autocast(device.type, enabled=False):
            return operator(*arguments)

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
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, *_ = saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        # The compiled operators compute them all.
        choice = {"output_mask": wanted} if query.device.type == "cuda" else {}
        operator = _operator("backward", query.device)
        return with_constants(operator(*grads[:3], *saved, *ctx.options, **choice), wanted)


def with_constants(
    grads: tuple[Tensor, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of a call, given those of query, key and value."""
    constants = len(Operands._fields) + len(Options._fields) - len(grads)
    of_student = (grad if yes else None for grad, yes in zip(grads, wanted, strict=True))
    return (*of_student, *[None] * constants)


def _operator(direction: str, device: torch.device) -> Any:
    prefix = "triton_" if device.type == "cuda" else ""
    return getattr(torch.ops.attn_kd, f"{prefix}attention_kl_{direction}")


if extension.module is not None:
    fake.register()
