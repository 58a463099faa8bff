"""Dense objectness: a first training of the backbone alone, by a head that is then thrown away.

A DETR learns from a handful of queries an image and converges slowly from scratch. A dense head on
the same feature map learns from every cell of it: what object the cell is central in, if any, and
that object's box. After some hundred steps the features tell objects from background, and where
they are; the transformer starts from there.

The box is absolute, not an offset from the cell: a DETR's query reads where an object is from the
features, so the features have to know where they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from attn_kd.training.callbacks import StopOnInterrupt, TrainingInterrupted
from attn_kd.training.records import latest_checkpoint
from attn_kd.training.sources import Source
from attn_kd.training.trainer import DistillationTrainer, is_last

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection, TrainerCallback, TrainingArguments

_NO_OBJECT_WEIGHT = 0.1  # most cells have none; these three are DETR's (Carion et al. 2020)
_L1_WEIGHT = 5.0
_GIOU_WEIGHT = 2.0
_CENTRAL = 0.5  # a cell is central in an object up to this share of the way from centre to side


def pretrain_backbone(
    model: DetrForObjectDetection,
    source: Source,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    keep: Callable[[], None],
) -> None:
    """Train the backbone of a detector in place by dense objectness.

    Goes on from the last checkpoint in ``arguments.output_dir`` if there is one; that folder is
    gone in the end.

    Args:
        keep: called when the backbone is trained, in one process, to save the detector.

    Raises:
        InputError: the training diverged, or a checkpoint is broken.
        TrainingInterrupted: Ctrl-C; the folder holds a checkpoint, or the detector is saved.
    """
    interrupt = StopOnInterrupt()
    trainer = DistillationTrainer(
        model=DenseObjectness(model),
        args=arguments,
        train_dataset=source.dataset,
        data_collator=source.collate,
        callbacks=[*callbacks, interrupt],
    )
    checkpoint = latest_checkpoint(Path(arguments.output_dir))
    with interrupt:
        if checkpoint is not None and is_last(checkpoint):
            trainer.load_weights(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.require_finite_weights()
    if trainer.is_world_process_zero():
        keep()
    trainer.accelerator.wait_for_everyone()  # every process has read the checkpoint, if any
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    if interrupt.requested:
        raise TrainingInterrupted("the backbone is pretrained; --resume goes on from there")


@dataclass
class DenseOutput(ModelOutput):
    """Losses of :class:`DenseObjectness`, 0-dimensional."""

    loss: Tensor | None = None
    class_loss: Tensor | None = None
    box_loss: Tensor | None = None


@dataclass(frozen=True)
class CellTargets:
    """What the cells of the feature maps should predict.

    Attributes:
        classes: ``[B, h, w]`` int64, the class of the object the cell is central in; K for none.
        boxes: ``[B, h, w, 4]`` that object's box (centre x, centre y, width, height, as shares of
            the image); anything where there is none.
    """

    classes: Tensor
    boxes: Tensor


class DenseObjectness(nn.Module):
    """The backbone of a DETR under a dense head; takes the same batches as the DETR.

    The head has two 1x1 convolutions, to K + 1 class logits (the last is "no object") and a box.
    """

    def __init__(self, detector: DetrForObjectDetection) -> None:
        super().__init__()
        self.backbone = detector.model.backbone
        self.num_labels: int = detector.config.num_labels
        channels = detector.model.input_projection.in_channels
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, self.num_labels + 1 + 4, 1),
        )

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
        pixel_mask: Tensor,  # [B, H, W]
        labels: list[dict[str, Any]],
    ) -> DenseOutput:
        features, inside = self.backbone(pixel_values, pixel_mask)[-1]
        predicted = self.head(features).float().movedim(1, -1)  # [B, h, w, K + 1 + 4]
        logits, boxes = predicted.split([self.num_labels + 1, 4], dim=-1)
        targets = cell_targets(inside, labels, self.num_labels)
        weight = torch.ones(self.num_labels + 1, device=logits.device)
        weight[-1] = _NO_OBJECT_WEIGHT
        class_loss = F.cross_entropy(logits[inside], targets.classes[inside], weight)
        central = inside & (targets.classes < self.num_labels)
        box_loss = _box_loss(boxes[central].sigmoid(), targets.boxes[central])
        return DenseOutput(class_loss + box_loss, class_loss.detach(), box_loss.detach())


def cell_targets(inside: Tensor, labels: list[dict[str, Any]], num_labels: int) -> CellTargets:
    """Which object each cell is central in.

    Where several are, it is the one relative to whose size the cell lies nearest to the centre. The
    cell nearest to an object's centre is central in it, however small the object.

    Args:
        inside: ``[B, h, w]`` bool, cells that are not padding; they are the image.
        labels: DETR's: ``class_labels [n]`` int64 and ``boxes [n, 4]``, shares of the image.
        num_labels: classes K.
    """
    pairs = [
        _image_targets(cells, label["boxes"], label["class_labels"], num_labels)
        for cells, label in zip(inside, labels, strict=True)
    ]
    classes, boxes = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return CellTargets(classes, boxes)


def _image_targets(
    inside: Tensor,  # [h, w] bool
    boxes: Tensor,  # [n, 4]
    class_labels: Tensor,  # [n]
    num_labels: int,
) -> tuple[Tensor, Tensor]:
    height, width = inside.shape
    classes = torch.full((height * width,), num_labels, device=inside.device)
    cell_boxes = boxes.new_zeros(height * width, 4)
    if len(boxes) > 0:
        centres, cell = _cell_centres(inside)  # [h·w, 2], [2]
        half_size = torch.maximum(boxes[:, 2:], cell) / 2
        # 0 at the centre of the box, 1 at its sides.
        distance = ((centres[:, None] - boxes[:, :2]).abs() / half_size).amax(-1)  # [h·w, n]
        nearest, chosen = distance.min(1)
        central = nearest <= _CENTRAL
        middle = distance.argmin(0)  # [n]
        central[middle] = True
        chosen[middle] = torch.arange(len(boxes), device=boxes.device)
        classes = torch.where(central, class_labels[chosen], classes)
        cell_boxes = boxes[chosen]
    return classes.view(height, width), cell_boxes.view(height, width, 4)


def _cell_centres(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of the cells ``[h·w, 2]`` and size of one ``[2]`` (x, y), in shares of the image."""
    height, width = inside.shape
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    y = (torch.arange(height, device=inside.device) + 0.5) / rows
    x = (torch.arange(width, device=inside.device) + 0.5) / columns
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], -1).flatten(0, 1), 1 / torch.stack([columns, rows])


def _box_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Mean over boxes ``[n, 4]`` (cxcywh) of DETR's 5 L1 + 2 (1 - GIoU); 0 for none."""
    if len(boxes) == 0:
        return boxes.sum()
    l1 = (boxes - targets).abs().sum(-1).mean()
    giou = generalized_iou(boxes, targets).mean()
    return _L1_WEIGHT * l1 + _GIOU_WEIGHT * (1 - giou)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019) ``[n]`` of boxes with boxes, both ``[n, 4]`` cxcywh."""
    low, high = _corners(boxes)
    other_low, other_high = _corners(others)
    overlap = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0)
    intersection = overlap.prod(-1)
    union = boxes[:, 2:].prod(-1) + others[:, 2:].prod(-1) - intersection
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(-1)
    return intersection / union - (hull - union) / hull


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
