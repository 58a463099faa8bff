"""Merged masks are no larger than they must be, and mean what torch's two masks mean."""

from __future__ import annotations

import pytest
import torch

from attn_kd.nn.masks import merge_masks, with_visible_keys

B, H, Lq, Lk = 2, 3, 4, 5
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
SHARED = torch.ones(Lq, Lk, dtype=torch.bool).triu(2)
EACH_HEAD = torch.stack([SHARED.roll(i, 1) for i in range(B * H)])


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


@pytest.mark.parametrize("floating", ["neither", "padding", "mask", "both"])
@pytest.mark.parametrize(
    ("padding", "mask", "shape"),
    [
        pytest.param(PADDING, None, (B, 1, 1, Lk), id="padding"),
        pytest.param(None, SHARED, (1, 1, Lq, Lk), id="shared"),
        pytest.param(None, EACH_HEAD, (B, H, Lq, Lk), id="each-head"),
        pytest.param(PADDING, SHARED, (B, 1, Lq, Lk), id="padding+shared"),
        pytest.param(PADDING, EACH_HEAD, (B, H, Lq, Lk), id="padding+each-head"),
    ],
)
def test_shape_and_what_is_visible(padding, mask, shape, floating):
    ignored = torch.zeros(B, H, Lq, Lk, dtype=torch.bool)
    if padding is not None:
        ignored |= padding[:, None, None]
        padding = additive(padding) if floating in ("padding", "both") else padding
    if mask is not None:
        ignored |= mask if mask.dim() == 2 else mask.view(B, H, Lq, Lk)
        mask = additive(mask) if floating in ("mask", "both") else mask
    merged = merge_masks(padding, mask, B)
    assert merged.shape == shape
    visible = merged if merged.dtype == torch.bool else merged == 0
    assert torch.equal(visible.expand(B, H, Lq, Lk), ~ignored)


def test_no_mask_stays_none():
    assert merge_masks(None, None, B) is None
    assert with_visible_keys(None, 2) is None


@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_more_keys_are_visible(floating):
    mask = additive(PADDING) if floating else ~PADDING
    longer = with_visible_keys(mask[:, None, None], 2)
    visible = longer == 0 if floating else longer
    assert torch.equal(visible[:, 0, 0, :Lk], ~PADDING)
    assert visible[..., Lk:].all()
