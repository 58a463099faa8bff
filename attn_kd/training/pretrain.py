"""Dense objectness: a first training of the backbone alone, by a head that is then thrown away.

A DETR learns from a handful of queries per image and converges slowly from scratch. A dense head
on the same feature map learns from every cell of it: whether an object's centre is near, and where
its sides are, as in FCOS (Tian et al. 2019). After some hundred steps the features tell objects
from background, and the transformer starts from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

_PRIOR = 0.01  # objectness a cell starts with, so that background does not swamp the first steps
_FOCAL_ALPHA, _FOCAL_GAMMA = 0.25, 2.0  # Lin et al. 2017
_CENTRE_SHARE = 0.25  # a cell is positive within this share of the box's size from its centre …
_CENTRE_CELLS = 0.75  # … or within so many cells, so that small boxes have a positive cell


@dataclass
class DenseOutput(ModelOutput):
    """Losses of :class:`DenseObjectness`, 0-dimensional."""

    loss: torch.Tensor | None = None
    class_loss: torch.Tensor | None = None
    box_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class CellTargets:
    """What each cell of a feature map should predict.

    Attributes:
        classes: ``[B, h, w, K]`` float, 1 for the class of the object the cell is central in.
        sides: ``[B, h, w, 4]`` distances from the cell's centre to the left, top, right and bottom
            side of that object, as shares of the image; anything where there is none.
        positive: ``[B, h, w]`` bool, whether there is one.
        inside: ``[B, h, w]`` bool, whether the cell lies in the image and not in its padding.
    """

    classes: torch.Tensor
    sides: torch.Tensor
    positive: torch.Tensor
    inside: torch.Tensor


class DenseObjectness(nn.Module):
    """The backbone of a DETR under a dense detection head; takes the same batches as the DETR.

    The head is made of two 3x3 convolutions and a 1x1 for K class logits and 4 sides per cell.
    """

    def __init__(self, detector: nn.Module, width: int = 128) -> None:
        super().__init__()
        self.backbone = detector.model.backbone
        self.num_labels = detector.config.num_labels
        channels = detector.model.input_projection.in_channels
        self.tower = nn.Sequential(_normed_conv(channels, width), _normed_conv(width, width))
        self.predictor = nn.Conv2d(width, self.num_labels + 4, 1)
        with torch.no_grad():
            self.predictor.bias[: self.num_labels] = -math.log((1 - _PRIOR) / _PRIOR)

    def forward(
        self,
        pixel_values: torch.Tensor,  # [B, 3, H, W]
        pixel_mask: torch.Tensor,  # [B, H, W]
        labels: list[dict[str, Any]],
    ) -> DenseOutput:
        features, inside = self.backbone(pixel_values, pixel_mask)[-1]
        predicted = self.predictor(self.tower(features)).float().movedim(1, -1)
        logits, raw_sides = predicted.split([self.num_labels, 4], dim=-1)
        targets = cell_targets(inside, labels, self.num_labels)
        class_loss = _focal_loss(logits[targets.inside], targets.classes[targets.inside])
        class_loss = class_loss / targets.positive.sum().clamp(min=1)
        # exp of small numbers at the start: a tenth of the image, a common size of object.
        sides = 0.1 * torch.exp(raw_sides[targets.positive])
        box_loss = _giou_loss(sides, targets.sides[targets.positive])
        return DenseOutput(class_loss + box_loss, class_loss.detach(), box_loss.detach())


def cell_targets(
    inside: torch.Tensor, labels: list[dict[str, Any]], num_labels: int
) -> CellTargets:
    """Which cells are central in which object.

    Args:
        inside: ``[B, h, w]`` bool, cells that are not padding; the image is their bounding box.
        labels: DETR's: ``class_labels [n]`` int64 and ``boxes [n, 4]`` centre and size, as shares
            of the image without its padding.
        num_labels: classes K.
    """
    per_image = [
        _image_targets(cells, label["boxes"], label["class_labels"], num_labels)
        for cells, label in zip(inside, labels, strict=True)
    ]
    classes, sides, positive = (torch.stack(parts) for parts in zip(*per_image, strict=True))
    return CellTargets(classes, sides, positive & inside, inside)


def _image_targets(
    inside: torch.Tensor,  # [h, w] bool
    boxes: torch.Tensor,  # [n, 4] cxcywh
    class_labels: torch.Tensor,  # [n]
    num_labels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    centres, cell = _cell_centres(inside)  # [h, w, 2] x, y; [2]
    if len(boxes) == 0:
        zeros = centres.new_zeros
        shape = inside.shape
        return zeros(*shape, num_labels), zeros(*shape, 4), zeros(shape, dtype=torch.bool)
    middle, size = boxes[:, :2], boxes[:, 2:]
    offset = centres[:, :, None] - middle  # [h, w, n, 2]
    reach = torch.maximum(_CENTRE_SHARE * size, _CENTRE_CELLS * cell)
    central = (offset.abs() <= reach).all(-1)  # [h, w, n]
    # Where objects overlap, the smaller one has fewer cells to be learned from.
    area = size.prod(-1).expand(central.shape).masked_fill(~central, math.inf)
    chosen = area.argmin(-1)  # [h, w]
    positive = central.any(-1)
    classes = F.one_hot(class_labels[chosen], num_labels) * positive[..., None]
    nearest = offset.gather(2, chosen[..., None, None].expand(*chosen.shape, 1, 2)).squeeze(2)
    half = size[chosen] / 2
    # The cell's centre may lie just outside a small box; sides are kept positive.
    sides = torch.cat([half + nearest, half - nearest], dim=-1).clamp(min=1e-3)
    return classes.to(boxes.dtype), sides, positive


def _cell_centres(inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of the cells ``[h, w, 2]`` and size of one ``[2]`` (x, y), in shares of the image."""
    height, width = inside.shape
    rows = inside.any(1).sum().clamp(min=1)
    columns = inside.any(0).sum().clamp(min=1)
    y = (torch.arange(height, device=inside.device) + 0.5) / rows
    x = (torch.arange(width, device=inside.device) + 0.5) / columns
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return centres, torch.stack([1 / columns, 1 / rows])


def _focal_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over all elements (Lin et al. 2017, eq. 5)."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    missed = torch.where(targets > 0, 1 - probability, probability)
    weight = torch.where(targets > 0, _FOCAL_ALPHA, 1 - _FOCAL_ALPHA)
    return (weight * missed**_FOCAL_GAMMA * losses).sum()


def _giou_loss(sides: torch.Tensor, target_sides: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - GIoU (Rezatofighi et al. 2019) of boxes around the same points; 0 for none.

    Args:
        sides, target_sides: ``[n, 4]`` positive distances to left, top, right, bottom.
    """
    if len(sides) == 0:
        return sides.sum()
    area = _area(sides)
    target_area = _area(target_sides)
    # Both boxes contain their common point: the overlap and the hull are made of sides too.
    overlap = _area(torch.minimum(sides, target_sides))
    hull = _area(torch.maximum(sides, target_sides))
    union = area + target_area - overlap
    giou = overlap / union - (hull - union) / hull
    return (1 - giou).mean()


def _area(sides: torch.Tensor) -> torch.Tensor:
    return (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])


def _normed_conv(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(inplace=True)
    )
