"""A trained detector as one object: pictures in, boxes in pixels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attn_kd.data import DetectionCollator
from attn_kd.data.images import to_tensor
from attn_kd.errors import InputError
from attn_kd.models import load_detector

if TYPE_CHECKING:
    import PIL.Image
    from transformers import BaseImageProcessor, PreTrainedModel


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first."""

    boxes: torch.Tensor  # [n, 4] float32: x1, y1, x2, y2 in pixels of the picture, within it
    scores: torch.Tensor  # [n] float32, 0 to 1
    labels: torch.Tensor  # [n] int64, keys of Detector.label_names

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self) -> list[tuple[list[float], float, int]]:
        """Box, score and label of each detection as plain numbers."""
        columns = self.boxes.tolist(), self.scores.tolist(), self.labels.tolist()
        return list(zip(*columns, strict=True))


class Detector:
    """A DETR-type model with the image processor it was trained with.

    Put into evaluation mode and moved to ``device``; the model itself is at ``.model``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model.to(device).eval()
        self.processor = processor
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, device: torch.device | str = "cpu"
    ) -> Detector:
        """Load a model folder, as written by ``attn-kd train`` and ``attn-kd distill``.

        Raises:
            InputError: the folder is missing, incomplete or broken.
        """
        return cls(*load_detector(folder), device=device)

    @property
    def label_names(self) -> dict[int, str]:
        """The names of the labels, by label."""
        return dict(self.model.config.id2label)

    @torch.inference_mode()
    def predict(
        self, images: Sequence[PIL.Image.Image], *, threshold: float = 0.5
    ) -> list[Detections]:
        """Detect objects in ``images``, all in one batch.

        Args:
            images: pictures of any size; sizes may differ, since smaller ones are padded and
                masked.
            threshold: the lowest score to keep, 0 to 1.

        Returns:
            One :class:`Detections` per picture.

        Raises:
            InputError: the threshold is outside 0 to 1.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}; expected a number from 0 to 1")
        if len(images) == 0:
            return []
        # Prepared as in training and evaluation, rather than by the processor itself.
        batch = DetectionCollator(self.processor)([_unlabelled(image) for image in images])
        outputs = self.model(
            pixel_values=batch["pixel_values"].to(self.device),
            pixel_mask=batch["pixel_mask"].to(self.device),
        )
        found = self.processor.post_process_object_detection(
            outputs,
            threshold=threshold,
            target_sizes=[(image.height, image.width) for image in images],
        )
        return [_sorted_and_clipped(one, image) for one, image in zip(found, images, strict=True)]


def _unlabelled(image: PIL.Image.Image) -> dict[str, Any]:
    """What the collator takes, of a picture of which nothing else is known."""
    nothing = {"boxes": torch.empty(0, 4), "class_labels": torch.empty(0, dtype=torch.int64)}
    return {"image": to_tensor(image), "target": nothing, "image_id": None}


def _sorted_and_clipped(found: dict[str, torch.Tensor], image: PIL.Image.Image) -> Detections:
    order = found["scores"].argsort(descending=True, stable=True)
    limit = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
    boxes = found["boxes"][order].float().cpu()
    return Detections(
        boxes=boxes.clamp(min=0).minimum(limit),
        scores=found["scores"][order].float().cpu(),
        labels=found["labels"][order].cpu(),
    )
