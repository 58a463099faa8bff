"""The size of a model: parameters, and multiply-accumulates of a forward pass."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included but not buffers (DETR's frozen batch norm)."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: PreTrainedModel, image_size: int | tuple[int, int]) -> int:
    """Multiply-accumulates of the forward pass of one image.

    Counted by ``torch.utils.flop_counter``: convolutions and matrix products, those of attention
    included; norms, activations and the softmax are left out, as is usual.

    Args:
        model: a detector of transformers; its mode and attention implementation are restored.
        image_size: height and width in pixels, or one number for both.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
    # The empty name is the detector itself: backbones know no other attention than their own.
    training, attention = model.training, model.config._attn_implementation
    counter = FlopCounterMode(display=False)
    try:
        model.set_attn_implementation({"": "eager"})  # fused attention is opaque to the counter
        with torch.no_grad(), counter:
            model.eval()(pixel_values=image)
    finally:
        model.set_attn_implementation({"": attention})
        model.train(training)
    return counter.get_total_flops() // 2
