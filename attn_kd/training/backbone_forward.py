"""Temporary changes to how a DETR's backbone runs; its weights and their names are left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection

#: Takes images ``[B, 3, H, W]`` and their mask; gives feature maps with their masks.
Forward = Callable[[torch.Tensor, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]


@contextlib.contextmanager
def feature_maps_as_input(*models: DetrForObjectDetection) -> Iterator[None]:
    """Let models take their backbone's feature maps where they take images.

    Inside, ``pixel_values`` may be feature maps ``[B, C, h, w]``, with C the channels the backbone
    ends in, and ``pixel_mask`` is then ``[B, h, w]``; images go through the backbone as ever.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            channels = model.model.input_projection.in_channels
            stack.enter_context(_wrapped(model, lambda f, c=channels: _accepting_features(f, c)))
        yield


@contextlib.contextmanager
def bf16_backbone(*models: DetrForObjectDetection) -> Iterator[None]:
    """Run the backbones of models under bfloat16 autocast; their feature maps come out as float32.

    On CPUs with bfloat16 instructions convolutions gain most from it, while a narrow transformer
    loses more to the casts than it gains.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_wrapped(model, _in_bf16))
        yield


@contextlib.contextmanager
def _wrapped(model: DetrForObjectDetection, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Put a forward of the instance before that of the class, as accelerate does for autocast."""
    backbone = model.model.backbone
    before: dict[str, Any] = {n: f for n, f in vars(backbone).items() if n == "forward"}
    backbone.forward = wrap(backbone.forward)
    try:
        yield
    finally:
        del backbone.forward
        vars(backbone).update(before)


def _accepting_features(backbone_forward: Forward, channels: int) -> Forward:
    def forward(pixel_values: torch.Tensor, pixel_mask: torch.Tensor):
        if pixel_values.shape[1] == channels:
            return [(pixel_values, pixel_mask.bool())]
        return backbone_forward(pixel_values, pixel_mask)

    return forward


def _in_bf16(backbone_forward: Forward) -> Forward:
    def forward(pixel_values: torch.Tensor, pixel_mask: torch.Tensor):
        with torch.autocast(pixel_values.device.type, dtype=torch.bfloat16):
            maps = backbone_forward(pixel_values, pixel_mask)
        return [(features.float(), mask) for features, mask in maps]

    return forward
