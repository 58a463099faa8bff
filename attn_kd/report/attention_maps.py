"""Where a detector's last encoder layer looks from one position, computed for a single picture.

Training never stores an attention map; one picture has room for it, so here the model runs once
with transformers' eager attention, which returns its maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

from attn_kd.data import to_rgb
from attn_kd.inference import Detector


@dataclass(frozen=True)
class EncoderAttention:
    """The self-attention of the last encoder layer for one picture, without its padding."""

    maps: Tensor  # [H, L, L] float32, rows sum to 1; L = height * width
    height: int  # of the grid of tokens that covers the picture
    width: int

    def token_at(self, x: float, y: float) -> int:
        """The token that covers the point (x, y), given in shares of the picture, 0 to 1."""
        column = min(int(x * self.width), self.width - 1)
        row = min(int(y * self.height), self.height - 1)
        return row * self.width + column

    def row(self, token: int) -> Tensor:
        """What ``token`` attends to: [height, width], averaged over heads."""
        return self.maps[:, token].mean(dim=0).view(self.height, self.width)


def encoder_attention(detector: Detector, image: PIL.Image.Image) -> EncoderAttention:
    """Run ``detector`` on ``image`` and return the maps of its last encoder layer.

    The model is left with eager attention, which computes the same, only with more memory.
    """
    detector.model.set_attn_implementation("eager")
    inputs = detector.processor(images=[to_rgb(image)], return_tensors="pt")
    inputs = inputs.to(detector.device)
    with torch.inference_mode():
        outputs = detector.model(**inputs, output_attentions=True)
        features = detector.model.model.backbone(inputs["pixel_values"], inputs["pixel_mask"])
    visible = features[-1][1][0].bool()  # [h, w]
    tokens = visible.flatten()
    maps = outputs.encoder_attentions[-1][0][:, tokens][:, :, tokens].float().cpu()
    height, width = int(visible.any(dim=1).sum()), int(visible.any(dim=0).sum())
    return EncoderAttention(maps, height, width)


def row_divergence(student: EncoderAttention, teacher: EncoderAttention, token: int) -> float:
    """KL(student ‖ teacher) of one row in nats, averaged over heads (Rubin et al. 2021, eq. 3)."""
    smallest = torch.finfo(torch.float32).tiny  # where a weight has vanished, its logarithm has not
    log_a, log_b = (one.maps[:, token].clamp(min=smallest).log() for one in (student, teacher))
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1).mean().item()
