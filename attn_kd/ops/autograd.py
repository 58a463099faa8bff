"""The autograd function over the compiled operators, one operator per direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_kd.ops import extension, fake


class FusedAttentionKL(torch.autograd.Function):
    """Attention and its divergence from a teacher's attention, by the compiled kernels.

    `apply(query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask, scale,
    teacher_scale, divergence)` returns (output, kl, lse, teacher_lse); shapes and semantics are
    those of `attn_kd.attention_kl`, but nothing is defaulted or cast here, and the mask must have
    been expanded to [B, H, Lq, Lk]. Without teacher tensors it is plain attention, and kl and
    teacher_lse are empty; a teacher_lse that was given is not returned again. Saves O(Lq) beyond
    its inputs and output, never a map.
    """

    @staticmethod
    def forward(
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
        return torch.ops.attn_kd.attention_kl_forward(
            query,
            key,
            value,
            teacher_query,
            teacher_key,
            teacher_lse,
            attn_mask,
            scale,
            teacher_scale,
            divergence,
        )

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask, *options = inputs
        attention, kl, lse, own_teacher_lse = output
        ctx.mark_non_differentiable(own_teacher_lse)
        if teacher_lse is None:
            teacher_lse = own_teacher_lse
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            query,
            key,
            value,
            teacher_query,
            teacher_key,
            attn_mask,
            attention,
            kl,
            lse,
            teacher_lse,
        )
        ctx.options = options

    @staticmethod
    @once_differentiable  # differentiating again raises, where it would silently give zeros
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_kl: Tensor | None,
        grad_lse: Tensor | None,
        _grad_teacher_lse: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        grads = torch.ops.attn_kd.attention_kl_backward(
            grad_output, grad_kl, grad_lse, *ctx.saved_tensors, *ctx.options
        )
        return (*grads, None, None, None, None, None, None, None)


def fused_attention_kl(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, kl, lse) of `FusedAttentionKL`."""
    output, kl, lse, _ = FusedAttentionKL.apply(*arguments)
    return output, kl, lse


if extension.module is not None:
    fake.register()
    # The operator differentiates by itself too, for callers who reach it through torch.ops.
    torch.library.register_autograd(
        "attn_kd::attention_kl_forward",
        FusedAttentionKL.backward,
        setup_context=FusedAttentionKL.setup_context,
    )
