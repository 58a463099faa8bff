"""A split of a COCO-format data folder as a torch data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from attn_kd.data.coco import ImageAnnotations, ImageEntry, load_split
from attn_kd.data.images import read_image
from attn_kd.errors import InputError


class CocoDetection(Dataset):
    """Images with boxes; images without a box are negatives.

    An item is a dictionary: `image` uint8 [3, H, W]; `target` with `boxes` float32 [n, 4] xyxy in
    pixels and `class_labels` int64 [n], crowd regions left out; `image_id`; `short_insertion`, a
    bool, False where the data does not mark it.

    Args:
        root: folder with `images/` and `annotations/`.
        split: "train", "val", "test", …
        transform: applied to each item, if given.

    Raises:
        InputError: something is missing or wrong; the message names the file and the entry.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self._split = load_split(root, split)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._split.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self._split.images[index]
        where = f"{self._split.annotation_file}: image {entry.image_id!r}"
        try:
            image = read_image(entry.path)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if image.shape[1:] != (entry.height, entry.width):
            raise InputError(
                f"{where} is given as {entry.width} x {entry.height} pixels; "
                f"{entry.path} has {image.shape[2]} x {image.shape[1]}"
            )
        single = ~entry.annotations.iscrowd
        item = {
            "image": image,
            "target": {
                "boxes": entry.annotations.boxes[single],
                "class_labels": entry.annotations.class_labels[single],
            },
            "image_id": entry.image_id,
            "short_insertion": bool(entry.extra.get("short_insertion", False)),
        }
        return self._transform(item) if self._transform else item

    @property
    def categories(self) -> list[str]:
        """Names of the classes, by label."""
        return self._split.categories

    @property
    def category_ids(self) -> list[int | str]:
        """COCO's ids of the classes, by label."""
        return self._split.category_ids

    @property
    def image_entries(self) -> list[ImageEntry]:
        """Path, size, annotations and extra keys of each image."""
        return self._split.images

    def annotations(self, index: int) -> ImageAnnotations:
        """The objects of an image, crowd regions included, without decoding the image."""
        return self._split.images[index].annotations
