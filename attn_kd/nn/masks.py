"""What masks hide, and the masks of torch.nn.MultiheadAttention as one mask of the operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.ops.reference import HIDDEN_BIAS


def visible(attn_mask: Tensor) -> Tensor:
    """Return where a mask of the operator, bool or additive, lets queries attend; bool."""
    if attn_mask.dtype == torch.bool:
        return attn_mask
    hidden = max(HIDDEN_BIAS, torch.finfo(attn_mask.dtype).min)  # float16 goes no lower than -65504
    return ~(attn_mask <= hidden)  # in this form NaN stays visible


def only_row(mask: Tensor) -> Tensor | None:
    """Return the row [..., 1, Lk] that all queries have, as with padding; None if they differ.

    A mask [..., Lq, Lk] that has rows in memory passes for one whose rows differ.
    """
    if mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., :1, :] if mask.stride(-2) == 0 else None


def merge_masks(
    key_padding_mask: Tensor | None,  # [B, Lk], bool (True = ignore) or additive
    attn_mask: Tensor | None,  # [Lq, Lk] or [B * H, Lq, Lk], bool (True = ignore) or additive
    batch: int,
) -> Tensor | None:
    """Return one mask, bool (True = may attend) or additive, that broadcasts to [B, H, Lq, Lk].

    No larger than it must be: [B, 1, 1, Lk] for mere padding, [1, 1, Lq, Lk] for a mask that all
    images share, and [B, 1, Lq, Lk] for both.
    """
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    if attn_mask is not None:
        shared = attn_mask.dim() == 2
        masks.append(attn_mask[None, None] if shared else attn_mask.unflatten(0, (batch, -1)))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        shown = [~mask for mask in masks]
        return shown[0] if len(shown) == 1 else shown[0] & shown[1]
    if len(masks) == 1:
        return masks[0]
    dtype = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
    padding, mask = (_additive(mask, dtype) for mask in masks)
    return padding + mask


def with_visible_keys(mask: Tensor | None, number: int) -> Tensor | None:
    """Return `mask` [..., Lk] with `number` more keys at the end that every query may see."""
    if mask is None or number == 0:
        return mask
    return F.pad(mask, (0, number), value=True if mask.dtype == torch.bool else 0.0)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
