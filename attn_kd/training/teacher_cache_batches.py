"""Records of a teacher cache beside the images that a student trains on, laid out for its batches.

Images of several sizes are padded to one, at the right and at the bottom. A record is of the image
alone, on its own grid; in the batch its cells lie at the top left of the padded grid, and the cells
of the padding are zero. They have no part in the loss: the student's mask hides those keys from
both maps, those rows are not counted (`attn_kd.nn.taps.distilled_rows`), and moved to another grid
what is visible is not mixed with padding (`attn_kd.distill.alignment`).

For that the student must see exactly the cells that the record has. How many of its cells a DETR
takes for visible depends on the size it is padded to (it samples the mask at the nearest pixel), so
a batch in which something is padded is padded on to a multiple of the stride: an image of H pixels
then shows ceil(H / stride) rows, as it does alone. What a batch shows is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from attn_kd.distill import TeacherPass
from attn_kd.distill.recorder import image_size
from attn_kd.errors import InputError
from attn_kd.nn.taps import AttentionRecord
from attn_kd.training.feature_cache import Collator
from attn_kd.training.teacher_cache import TeacherCache
from attn_kd.training.teacher_cache_format import CachedLayer, Grid, ImageRecord

#: Where a batch has what the teacher made of its images.
TEACHER_KEY = "teacher"


@dataclass(frozen=True)
class TeacherOutput:
    """What the loss and the user may ask of a teacher's output."""

    logits: Tensor  # [B, num_queries, classes + 1]
    pred_boxes: Tensor  # [B, num_queries, 4]


class TaughtItems(Dataset):
    """The items of a data set with the teacher's records of their images.

    Args:
        dataset: items in views, :class:`~attn_kd.training.sampling.ViewedItems` or
            :class:`~attn_kd.training.feature_cache.CachedFeatures`.
        cache: of the teacher.
        rows: for every item its index in the cache.
        layers: paths of the teacher's layers to read.

    Raises:
        InputError: there are augmented views, and items are not at their index in the cache: the
            augmentation of a view is random by the index.
    """

    def __init__(
        self, dataset: Any, cache: TeacherCache, rows: Sequence[int], layers: Sequence[str]
    ) -> None:
        if dataset.views > 1:
            _require_same_order(rows, cache)
        self.dataset = dataset
        self.cache = cache
        self.rows = list(rows)
        self.layers = list(layers)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.cache.read(self.rows[index], self.dataset.view(index), self.layers)
        return {**self.dataset[index], TEACHER_KEY: record}


class TaughtCollator:
    """Adds to a batch, under `TEACHER_KEY`, the teacher's records in the layout of the batch.

    That is a dictionary of ``logits`` [B, N, classes + 1], ``boxes`` [B, N, 4] and ``layers``, per
    path of ``query`` [B, Ht, Lq, Dt], ``key`` [B, Ht, Lk, Dt] and ``lse`` [B, Ht, Lq].

    Args:
        collate: makes the batch, of images or of their features.
        layers: of the cache.
        stride: of the teacher, in pixels.
        features: whether batches are of features, with a mask of cells.
    """

    def __init__(
        self, collate: Collator, layers: Sequence[CachedLayer], stride: int, *, features: bool
    ) -> None:
        self._collate = collate
        self._layers = {layer.path: layer for layer in layers}
        self._stride = stride
        self._features = features

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch.

        Raises:
            InputError: the batch does not show the cells that a record has.
        """
        records: list[ImageRecord] = [item[TEACHER_KEY] for item in items]
        batch = self._collate([dict(item) for item in items])
        if not self._features:
            batch = padded_to_stride(batch, self._stride)
        cells = self._cells(batch["pixel_mask"])
        _require_visible(cells, records)
        grid = (cells.shape[1], cells.shape[2])
        return {
            **batch,
            TEACHER_KEY: {
                "logits": torch.stack([record.logits for record in records]),
                "boxes": torch.stack([record.boxes for record in records]),
                "layers": {path: self._laid_out(path, records, grid) for path in records[0].layers},
                "visible": None if cells.all() else cells.flatten(1)[:, None, None],
            },
        }

    def _cells(self, mask: Tensor) -> Tensor:
        """Which cells [B, h, w] of a batch are visible, as DETR finds out."""
        if self._features:
            return mask.bool()
        grid = [-(-side // self._stride) for side in mask.shape[1:]]
        return F.interpolate(mask[None].float(), size=grid)[0].bool()

    def _laid_out(self, path: str, records: list[ImageRecord], grid: Grid) -> dict[str, Tensor]:
        """One layer's tensors for a batch whose padded grid is `grid`."""
        layer = self._layers[path]
        on_grid = {"query": layer.grid_queries, "key": layer.grid_keys, "lse": layer.grid_queries}
        tensors = {}
        for part, is_grid in on_grid.items():
            parts = [getattr(record.layers[path], part) for record in records]
            if is_grid:
                parts = [
                    _on_grid(tensor, record.grid, grid)
                    for tensor, record in zip(parts, records, strict=True)
                ]
            tensors[part] = torch.stack(parts)
        return tensors


def teacher_pass(
    batch: Mapping[str, Any], layers: Sequence[CachedLayer]
) -> tuple[dict[str, Any], TeacherPass]:
    """Take a batch of a `TaughtCollator` apart: the student's inputs, and the teacher's pass."""
    inputs = dict(batch)
    kept = inputs.pop(TEACHER_KEY)
    by_path = {layer.path: layer for layer in layers}
    records = {
        path: AttentionRecord(
            tensors["query"],
            tensors["key"],
            tensors["lse"],
            by_path[path].scale,
            attn_mask=kept["visible"] if by_path[path].grid_keys else None,
            mask_known=True,
        )
        for path, tensors in kept["layers"].items()
    }
    output = TeacherOutput(kept["logits"], kept["boxes"])
    return inputs, TeacherPass(records, output, image_size(inputs))


def padded_to_stride(batch: dict[str, Any], stride: int) -> dict[str, Any]:
    """The batch, its images padded to a multiple of the stride unless they fill it already."""
    pixels, mask = batch["pixel_values"], batch["pixel_mask"]
    bottom, right = (-side % stride for side in mask.shape[1:])
    if mask.all() or not (bottom or right):
        return batch
    return {
        **batch,
        "pixel_values": F.pad(pixels, (0, right, 0, bottom)),
        "pixel_mask": F.pad(mask, (0, right, 0, bottom)),
    }


def _on_grid(tokens: Tensor, own: Grid, padded: Grid) -> Tensor:
    """Cells [Ht, h * w, ...] of an image's own grid on the padded one [Ht, H * W, ...]."""
    if own == padded:
        return tokens
    cells = tokens.unflatten(1, own)
    placed = cells.new_zeros(cells.shape[0], *padded, *cells.shape[3:])
    placed[:, : own[0], : own[1]] = cells
    return placed.flatten(1, 2)


def _require_same_order(rows: Sequence[int], cache: TeacherCache) -> None:
    """Check that every image has the same index in the data and in the cache."""
    for index, row in enumerate(rows):
        if row != index:
            raise InputError(
                f"image {index} of the data is image {row} of the teacher cache {cache.folder}, "
                f"whose augmented views are those of image {row}; expected the images in the order "
                "of the cache from its first on, or --no-augment"
            )


def _require_visible(cells: Tensor, records: Sequence[ImageRecord]) -> None:
    """Check that of every image the cells [B, h, w] of its record are visible, and no others."""
    for mask, record in zip(cells, records, strict=True):
        height, width = record.grid
        shown = tuple(int(mask.any(axis).sum()) for axis in (1, 0))
        if shown != record.grid or not mask[:height, :width].all():
            raise InputError(
                f"an image shows {shown[0]} x {shown[1]} cells in its batch, {height} x {width} in "
                "the teacher cache; expected images prepared as for the cache"
            )
