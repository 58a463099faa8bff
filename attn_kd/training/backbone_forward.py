"""Temporary changes to how a DETR's backbone runs; its weights and their names are left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection

Maps = list[tuple[Tensor, Tensor]]  # feature maps [B, C, h, w] and their masks [B, h, w] bool
Forward = Callable[[Tensor, Tensor], Maps]  # of images [B, 3, H, W] and their mask [B, H, W]


@contextlib.contextmanager
def feature_maps_as_input(*models: DetrForObjectDetection) -> Iterator[None]:
    """Let models take their backbone's feature maps where they take images.

    Inside, ``pixel_values`` may be feature maps ``[B, C, h, w]``, with C the channels the backbone
    ends in, and ``pixel_mask`` is then ``[B, h, w]``; images go through the backbone as ever.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            channels = model.model.input_projection.in_channels
            stack.enter_context(_wrapped(model, partial(_accepting_features, channels)))
        yield


@contextlib.contextmanager
def bf16_backbone(*models: DetrForObjectDetection) -> Iterator[None]:
    """Run the backbones of models under bfloat16 autocast; their feature maps come out as float32.

    On CPUs with bfloat16 instructions convolutions gain most from it, while a narrow transformer
    loses more to the casts than it gains. On CPUs without them nothing is changed.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            if computes_bf16(model.device):
                stack.enter_context(_wrapped(model, _in_bf16))
        yield


def computes_bf16(device: torch.device | str) -> bool:
    """Whether there are instructions for it; a CPU that emulates it is slower than in float32."""
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(has is True for name, has in capabilities.items() if name.endswith("bf16"))


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


def _accepting_features(channels: int, backbone_forward: Forward) -> Forward:
    def forward(pixel_values: Tensor, pixel_mask: Tensor) -> Maps:
        if pixel_values.shape[1] == channels:
            return [(pixel_values, pixel_mask.bool())]
        return backbone_forward(pixel_values, pixel_mask)

    return forward


def _in_bf16(backbone_forward: Forward) -> Forward:
    def forward(pixel_values: Tensor, pixel_mask: Tensor) -> Maps:
        with torch.autocast(pixel_values.device.type, dtype=torch.bfloat16):
            maps = backbone_forward(pixel_values, pixel_mask)
        return [(features.float(), mask) for features, mask in maps]

    return forward
