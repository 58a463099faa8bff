"""The attention map itself, for callers that ask to see it."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_kd.nn.masks import visible


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
    shown = visible(attn_mask)
    if attn_mask.dtype != torch.bool:
        logits = logits + attn_mask
    # The softmax of a row without keys is NaN, and so would be its gradient, however it is masked
    # later: such a row is filled with 0 first.
    blind = ~shown.any(dim=-1, keepdim=True)
    weights = logits.masked_fill(~shown, float("-inf")).masked_fill(blind, 0.0).softmax(dim=-1)
    return weights.masked_fill(blind, 0.0).to(query.dtype)
