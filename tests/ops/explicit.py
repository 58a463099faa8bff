"""The operator from its definition, on attention maps that are written out.

In float64 this is the truth the tests measure errors against; in a lower precision it is the eager
code that a practitioner would write, every step in that dtype, and so the bar for accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_kl(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    teacher_query: Tensor | None,  # [B, H, Lq, Dt]
    teacher_key: Tensor | None,  # [B, H, Lk, Dt]
    *,
    teacher_lse: Tensor | None = None,  # [B, H, Lq]
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    divergence: str = "reverse_kl",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return output [B, H, Lq, Dv], divergence [B, H, Lq] (None without teacher), LSE [B, H, Lq].

    Rows that see no key give 0, 0 and -inf.
    """
    visible = _visible(attn_mask, (*query.shape[:3], key.shape[2]))
    row_visible = visible.any(-1)
    logits = _logits(query, key, scale, attn_mask, visible)
    lse = torch.logsumexp(logits, -1)
    log_a = logits.log_softmax(-1)
    output = log_a.exp() @ value
    kl = None
    if teacher_query is not None and teacher_key is not None:
        teacher_logits = _logits(teacher_query, teacher_key, teacher_scale, attn_mask, visible)
        if teacher_lse is None:
            log_b = teacher_logits.log_softmax(-1)
        else:  # -inf in rows that see no key, which stay finite as their logits do
            log_b = teacher_logits - torch.where(row_visible, teacher_lse, 0)[..., None]
        log_b = log_b.to(log_a.dtype)
        log_ratio = torch.where(visible, log_a - log_b, 0)
        terms = log_a.exp() * log_ratio if divergence == "reverse_kl" else -log_b.exp() * log_ratio
        kl = torch.where(row_visible, terms.sum(-1), 0)
    output = torch.where(row_visible[..., None], output, 0)
    return output, kl, torch.where(row_visible, lse, -torch.inf)


def teacher_lse(
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    teacher_scale: float | None = None,
) -> Tensor:
    """Return the log-sum-exp [B, H, Lq] of the teacher's scaled and masked logits."""
    no_value = teacher_key[..., :0]
    return attention_kl(
        teacher_query, teacher_key, no_value, None, None, attn_mask=attn_mask, scale=teacher_scale
    )[2]


def _visible(attn_mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if attn_mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if attn_mask.dtype != torch.bool:
        attn_mask = attn_mask > -1e29  # the lowest finite number hides as -inf does
    return attn_mask.expand(shape)


def _logits(
    query: Tensor, key: Tensor, scale: float | None, attn_mask: Tensor | None, visible: Tensor
) -> Tensor:
    """Return [B, H, Lq, Lk]; rows that see nothing stay finite, they are replaced at the end."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * (query @ key.transpose(-1, -2))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + torch.where(visible, attn_mask, 0).to(logits.dtype)
    return logits.masked_fill(~visible & visible.any(-1, keepdim=True), -torch.inf)
