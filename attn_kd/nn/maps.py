"""The attention map itself, for callers that ask to see it."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_map(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale · query keyᵀ + mask) [B, H, Lq, Lk], dtype of query, differentiable.

    O(Lq · Lk) memory, unlike everything else here: for looking at a map, not for training. The
    mask is that of `attn_kd.attention`; the row of a query that sees no key is 0.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query * scale) @ key.mT
    if attn_mask is None:
        return logits.softmax(dim=-1).to(query.dtype)
    if attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    else:
        logits = logits + attn_mask
    blind = (logits == float("-inf")).all(dim=-1, keepdim=True)
    # The softmax of such a row is NaN, and so would be its gradient, however it is masked later.
    weights = logits.masked_fill(blind, 0.0).softmax(dim=-1)
    return weights.masked_fill(blind, 0.0).to(query.dtype)
