"""The operator from its definition, on attention maps that are written out.

In float64 this is the truth the tests measure errors against; in a lower precision it is the eager
code that a practitioner would write, every step in that dtype, and so the bar for accuracy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_kl(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    teacher_query: Tensor | None,  # [B, Ht, Lq, Dt]
    teacher_key: Tensor | None,  # [B, Ht, G * Lk, Dt]
    *,
    teacher_lse: Tensor | None = None,  # [B, Ht, Lq]
    attn_mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    divergence: str = "reverse_kl",
    head_reduction: str = "none",
    dropout_p: float = 0.0,
    kept: Tensor | None = None,  # [B, H, Lq, Lk] bool, what dropout keeps
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return output [B, H, Lq, Dv], divergence (None without teacher), LSE [B, H, Lq].

    The divergence is [B, H, Lq], of head-averaged maps [B, Lq]. Rows that see no key give 0, 0 and
    -inf.
    """
    keys = key.shape[2]
    visible = _visible(attn_mask, (*query.shape[:3], keys))
    row_visible = visible.any(-1)
    logits = _logits(query, key, scale, attn_mask, visible)
    lse = torch.logsumexp(logits, -1)
    log_a = logits.log_softmax(-1)
    attention = log_a.exp()
    if kept is not None:
        attention = torch.where(kept, attention / (1 - dropout_p), 0)
    output = torch.where(row_visible[..., None], attention @ value, 0)
    kl = None
    if teacher_query is not None and teacher_key is not None:
        if teacher_query.shape[1] != query.shape[1]:  # one mask serves all heads
            visible = visible[:, :1]
        log_b = log_teacher(
            teacher_query, teacher_key, keys, teacher_lse, attn_mask, visible, teacher_scale
        )
        log_a, log_b = (torch.where(visible, x, LOG_ZERO) for x in (log_a, log_b.to(log_a.dtype)))
        if head_reduction == "mean":
            log_a, log_b = (x.logsumexp(1) - math.log(x.shape[1]) for x in (log_a, log_b))
        terms = DIVERGENCES[divergence](log_a, log_b)
        sees = row_visible.any(1) if head_reduction == "mean" else row_visible
        kl = torch.where(sees, terms.sum(-1), 0)
        if row_weights is not None:
            kl = kl * row_weights
    return output, kl, torch.where(row_visible, lse, -torch.inf)


LOG_ZERO = -1e4  # exp of it is 0 in every dtype, and two of them differ by 0

DIVERGENCES = {
    "reverse_kl": lambda log_a, log_b: log_a.exp() * (log_a - log_b),
    "forward_kl": lambda log_a, log_b: log_b.exp() * (log_b - log_a),
    "js": lambda log_a, log_b: (
        log_a.exp() * (log_a - log_of_mean(log_a, log_b)) / 2
        + log_b.exp() * (log_b - log_of_mean(log_a, log_b)) / 2
    ),
    "mse": lambda log_a, log_b: (log_a.exp() - log_b.exp()) ** 2,
}


def log_of_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.logaddexp(log_a, log_b) - math.log(2)


def log_teacher(
    query: Tensor,
    key: Tensor,
    keys: int,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    visible: Tensor,
    scale: float | None,
) -> Tensor:
    """Return the teacher's log-probabilities [B, Ht, Lq, Lk], summed over groups of its keys."""
    everything = visible.new_ones(())
    logits = _logits(query, key, scale, None, everything)
    logits = logits.unflatten(-1, (keys, -1)).logsumexp(-1)
    logits = _masked(logits, attn_mask, visible)
    if lse is None:
        return logits.log_softmax(-1)
    # -inf in rows that see no key, which stay finite as their logits do
    return logits - torch.where(visible.any(-1), lse, 0)[..., None]


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
    """Return the scaled and masked logits [B, H, Lq, Lk]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _masked(scale * (query @ key.transpose(-1, -2)), attn_mask, visible)


def _masked(logits: Tensor, attn_mask: Tensor | None, visible: Tensor) -> Tensor:
    """Return the logits under the mask; rows that see nothing stay finite, to be replaced."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + torch.where(visible, attn_mask, 0).to(logits.dtype)
    return logits.masked_fill(~visible & visible.any(-1, keepdim=True), -torch.inf)
