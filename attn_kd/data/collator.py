"""From items of a data set to a batch that a DETR takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.data.augmentation import Augmentation
from attn_kd.errors import InputError


class DetectionCollator:
    """Augments, resizes, normalises and pads images; builds DETR's labels.

    The image processor is only read: its `size`, `image_mean`, `image_std`, `rescale_factor` and
    `pad_size` decide, so what is trained is what `preprocessor_config.json` describes. The work
    itself is done in torch, several times faster than by the processor.

    Boxes are relative to the resized image *before* padding, as in the original DETR; then
    `post_process_object_detection` with the original sizes is right whatever the padding.

    Args:
        processor: a transformers `DetrImageProcessor` of any backend.
        augmentation: applied to every item; None for evaluation.
    """

    def __init__(self, processor: Any, augmentation: Augmentation | None = None) -> None:
        self._resized = _resizing_rule(processor)
        self._augmentation = augmentation
        self._pad_size = _pair(getattr(processor, "pad_size", None))
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        normalise = processor.do_normalize
        mean = torch.tensor(processor.image_mean if normalise else [0.0] * 3)
        std = torch.tensor(processor.image_std if normalise else [1.0] * 3)
        self._scale = (factor / std).view(3, 1, 1)
        self._shift = (-mean / std).view(3, 1, 1)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build a batch of B items.

        Args:
            items: dictionaries with `image`, `target`, `image_id`, as from `CocoDetection`. An
                `augmentation_seed` makes the item's augmentation depend on it alone; where it is
                None the item is not augmented.

        Returns:
            `pixel_values` float32 [B, 3, H, W]; `pixel_mask` int64 [B, H, W], 1 on the image, 0
            on padding; `labels`, per image a dictionary of `class_labels` int64 [n], `boxes`
            float32 [n, 4] (centre x, centre y, width, height; relative), `image_id`, `orig_size`
            int64 [2] (height, width) before augmentation.

        Raises:
            InputError: the list is empty.
        """
        if not items:
            raise InputError("the batch is empty; expected at least one item")
        images, labels = zip(*(self._prepare(item) for item in items), strict=True)
        height = max(image.shape[1] for image in images)
        width = max(image.shape[2] for image in images)
        if self._pad_size:
            height, width = max(height, self._pad_size[0]), max(width, self._pad_size[1])
        pixel_values = torch.zeros(len(images), 3, height, width)
        pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
        for index, image in enumerate(images):
            rows, columns = image.shape[1:]
            # In place: intermediate images of this size would cost more than the arithmetic.
            pixel_values[index, :, :rows, :columns].copy_(image).mul_(self._scale).add_(self._shift)
            pixel_mask[index, :rows, :columns] = 1
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": list(labels)}

    def _prepare(self, item: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The augmented and resized image uint8 [1 or 3, h, w] of an item, and its labels."""
        image = item["image"]
        if image.stride(0) == 0:  # grey, its channels share their memory: one is enough so far
            image = image[:1]
        boxes, class_labels = item["target"]["boxes"], item["target"]["class_labels"]
        orig_size = torch.tensor(image.shape[1:])
        if self._augmentation is not None and item.get("augmentation_seed", 0) is not None:
            image, boxes, class_labels = self._augmentation(
                image, boxes, class_labels, _item_generator(item)
            )
        height, width = image.shape[1:]
        label = {
            "class_labels": class_labels,
            "boxes": _relative_centres(boxes, height, width),
            "image_id": item["image_id"],
            "orig_size": orig_size,
        }
        # The rules round down: to no pixel at all where one side is much longer than the other.
        rows, columns = (max(1, side) for side in self._resized(height, width))
        return _resize(image, (rows, columns)), label


def _item_generator(item: dict[str, Any]) -> torch.Generator | None:
    seed = item.get("augmentation_seed")
    return None if seed is None else torch.Generator().manual_seed(seed)


def _relative_centres(boxes: Tensor, height: int, width: int) -> Tensor:
    """xyxy in pixels to (centre x, centre y, width, height) relative to the image."""
    low, high = boxes[:, :2], boxes[:, 2:]
    size = boxes.new_tensor([width, height])
    return torch.cat([(low + high) / (2 * size), (high - low) / size], dim=1)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, the same as Pillow's; uint8 [1 or 3, h, w]."""
    if image.shape[1:] == size:
        return image
    resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)
    return resized[0]


def _pair(size: Any) -> tuple[int, int] | None:
    if not size:
        return None
    return int(size["height"]), int(size["width"])


def _resizing_rule(processor: Any) -> Any:
    """The function (height, width) -> resized (height, width) that the processor describes.

    Raises:
        InputError: the processor's size is of an unknown kind.
    """
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    size = processor.size
    if not processor.do_resize:
        return lambda height, width: (height, width)
    if size.get("shortest_edge"):
        shortest, longest = size["shortest_edge"], size.get("longest_edge")
        return lambda height, width: get_size_with_aspect_ratio((height, width), shortest, longest)
    if size.get("max_height") and size.get("max_width"):
        limits = size["max_height"], size["max_width"]
        return lambda h, w: get_image_size_for_max_height_width((h, w), *limits)
    if size.get("height") and size.get("width"):
        fixed = size["height"], size["width"]
        return lambda height, width: fixed
    raise InputError(f"the image processor has size {dict(size)}; expected one that DETR knows")
