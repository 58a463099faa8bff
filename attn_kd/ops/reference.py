"""The operator in plain torch: the readable twin of every kernel, and the backend of last resort.

It follows the definitions, not the streaming algebra of the kernels, so agreement between the two
means something. Query rows are processed in blocks, and each block is recomputed in the backward
pass, so that memory stays proportional to a block of the attention map rather than to all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Elements of one [B, H, block, Lk] score tile. 36 MiB of floats is past the size (32 MiB) up to
# which glibc may keep freed memory in its heap: smaller tiles are faster, but fragment it into
# gigabytes.
_BLOCK_ELEMENTS = 9 * 1024 * 1024

# An additive mask value up to this one hides the pair as -inf does, in every backend: many masks
# are made of -1e9 or torch.finfo(dtype).min.
_HIDDEN = -1e6


def attention_kl_reference(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    teacher_query: Tensor | None,  # [B, H, Lq, Dt]
    teacher_key: Tensor | None,  # [B, H, Lk, Dt]
    teacher_lse: Tensor | None,  # [B, H, Lq]
    attn_mask: Tensor | None,  # [B, H, Lq, Lk], expanded; bool or additive
    scale: float,
    teacher_scale: float,
    divergence: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention output [B, H, Lq, Dv], divergence [B, H, Lq] and student LSE [B, H, Lq].

    Without a teacher the divergence is an empty tensor. Logits and reductions are float32 (float64
    for float64 inputs) whatever the input dtype.
    """
    inputs = (query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    dtype = query.dtype
    batch, heads, rows, _ = query.shape
    # Widened here rather than per block, so that the blocks' gradients add up in the wide type.
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if teacher_query is not None and teacher_key is not None:
        teacher_query, teacher_key = teacher_query.to(wide), teacher_key.to(wide)
    if teacher_lse is not None:
        teacher_lse = teacher_lse.to(wide)
    if attn_mask is not None and (rows == 1 or attn_mask.stride(2) == 0):
        # A key padding mask: what fills the padding, NaN perhaps, must not reach a product.
        visible = _visible(attn_mask[:, :, :1])
        assert visible is not None
        padding = ~visible.transpose(-1, -2)
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
        if teacher_key is not None:
            teacher_key = teacher_key.masked_fill(padding, 0.0)

    block = max(1, min(rows, _BLOCK_ELEMENTS // (batch * heads * key.shape[2])))

    parts = []
    for start in range(0, rows, block):
        stop = min(start + block, rows)

        def rows_of(tensor: Tensor | None, start: int = start, stop: int = stop) -> Tensor | None:
            return None if tensor is None else tensor[:, :, start:stop]

        arguments: tuple[Any, ...] = (
            rows_of(query),
            key,
            value,
            rows_of(teacher_query),
            teacher_key,
            rows_of(teacher_lse),
            rows_of(attn_mask),
            scale,
            teacher_scale,
            divergence,
        )
        if needs_grad and block < rows:
            parts.append(checkpoint(_attention_kl_rows, *arguments, use_reentrant=False))
        else:
            parts.append(_attention_kl_rows(*arguments))
    output, kl, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return output.to(dtype), (kl if teacher_query is not None else kl.new_empty(0)), lse


def _attention_kl_rows(
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
) -> tuple[Tensor, Tensor, Tensor]:
    visible = _visible(attn_mask)
    # A row that sees no key is computed as if it saw all of them, then replaced: every
    # intermediate stays finite, so its gradient is an exact zero instead of NaN.
    row_visible = None if visible is None else visible.any(dim=-1)
    logits = _logits(query, key, scale, attn_mask, visible)
    lse = torch.logsumexp(logits, dim=-1)
    # Not logits - lse: where a row's logits share a large offset, its LSE has no digits left.
    log_attention = torch.log_softmax(logits, dim=-1)
    output = log_attention.exp() @ value

    kl = lse.new_zeros(lse.shape)
    if teacher_query is not None and teacher_key is not None:
        teacher_logits = _logits(teacher_query, teacher_key, teacher_scale, attn_mask, visible)
        if teacher_lse is None:
            log_teacher = torch.log_softmax(teacher_logits, dim=-1)
        else:
            log_teacher = teacher_logits - teacher_lse[..., None]
        kl = _DIVERGENCES[divergence](log_attention, log_teacher, visible)

    if row_visible is not None:
        output = torch.where(row_visible[..., None], output, 0.0)
        kl = torch.where(row_visible, kl, 0.0)
        lse = torch.where(row_visible, lse, float("-inf"))
    return output, kl, lse


def _visible(attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attn_mask
    return ~(attn_mask <= _HIDDEN)  # in this form NaN stays visible


def _logits(
    query: Tensor, key: Tensor, scale: float, attn_mask: Tensor | None, visible: Tensor | None
) -> Tensor:
    """Scaled and masked logits."""
    logits = scale * (query @ key.transpose(-1, -2))
    if attn_mask is None or visible is None:
        return logits
    if attn_mask.dtype != torch.bool:
        logits = logits + attn_mask.to(logits.dtype).masked_fill(~visible, 0.0)
    hidden = ~visible & visible.any(dim=-1, keepdim=True)
    return logits.masked_fill(hidden, float("-inf"))


def _log_ratio(log_student: Tensor, log_teacher: Tensor, visible: Tensor | None) -> Tensor:
    """log(a / b), 0 where the pair is masked (there it would be -inf + inf)."""
    if visible is None:
        return log_student - log_teacher
    return torch.where(visible, log_student - log_teacher, 0.0)


def _reverse_kl(log_student: Tensor, log_teacher: Tensor, visible: Tensor | None) -> Tensor:
    return (log_student.exp() * _log_ratio(log_student, log_teacher, visible)).sum(-1)


def _forward_kl(log_student: Tensor, log_teacher: Tensor, visible: Tensor | None) -> Tensor:
    return -(log_teacher.exp() * _log_ratio(log_student, log_teacher, visible)).sum(-1)


# KL(student || teacher) and KL(teacher || student) of one row, from log-probabilities [..., Lk].
_DIVERGENCES = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl}
