"""The annotation file of a COCO-format split, read and checked once."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_kd.errors import InputError


@dataclass(frozen=True)
class ImageAnnotations:
    """The objects of one image: boxes xyxy in pixels.

    boxes: float32 [n, 4]; class_labels: int64 [n], indices into the split's categories;
    iscrowd: bool [n], a region of many objects rather than one.
    """

    boxes: Tensor
    class_labels: Tensor
    iscrowd: Tensor

    def __len__(self) -> int:
        return len(self.class_labels)


@dataclass(frozen=True)
class ImageEntry:
    """One image of a split; `extra` holds the keys beyond COCO's (recording, frame_index, …)."""

    image_id: int | str
    path: Path
    width: int
    height: int
    annotations: ImageAnnotations
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CocoSplit:
    """A checked split: label i of its annotations is the class `categories[i]`."""

    annotation_file: Path
    categories: list[str]
    category_ids: list[int | str]
    images: list[ImageEntry]


def annotation_file(root: str | os.PathLike, split: str) -> Path:
    """Where the annotations of a split lie in a data folder."""
    return Path(root) / "annotations" / f"instances_{split}.json"


def load_split(root: str | os.PathLike, split: str) -> CocoSplit:
    """Read and check one split of a data folder.

    Categories are ordered by id, numbers before strings. Boxes that reach beyond their image are
    clipped and boxes wholly outside are dropped, with one warning for the split.

    Args:
        root: folder with `images/` and `annotations/instances_SPLIT.json`.
        split: "train", "val", "test", …

    Raises:
        InputError: something is missing or wrong; the message names the file and the entry.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist; expected images/ and annotations/")
    file = annotation_file(root, split)
    document = _read_json(root, file)
    category_ids, categories = _read_categories(file, document["categories"])
    entries = _index_images(file, document["images"])
    boxes = _Boxes(file, entries, {number: i for i, number in enumerate(category_ids)})
    boxes.read(document["annotations"])
    images = [
        _image_entry(file, root / "images", entry, boxes.of_image(image_id))
        for image_id, entry in entries.items()
    ]
    return CocoSplit(file, categories, category_ids, images)


def _read_json(root: Path, file: Path) -> dict[str, list[dict]]:
    """The document, with its three lists present and made of objects."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        splits = sorted(p.stem.removeprefix("instances_") for p in file.parent.glob("instances_*"))
        there = f"the splits there are: {', '.join(splits)}" if splits else f"{root} has no split"
        raise InputError(f"{file} does not exist; {there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or beyond what Python reads
        raise InputError(f"{file} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        rows = document.get(key) if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{file} is not in COCO format: expected a list of objects at {key!r}")
    return document


def _unique(file: Path, kind: str, rows: Iterable[dict]) -> dict[Any, dict]:
    """Rows by their id.

    Raises:
        InputError: an id is missing, no number or string, or used twice.
    """
    by_id: dict[Any, dict] = {}
    for position, row in enumerate(rows):
        number = row.get("id")
        if isinstance(number, bool) or not isinstance(number, int | str):
            raise InputError(f"{file}: {kind} at position {position} has id {number!r}")
        if number in by_id:
            raise InputError(f"{file}: two {kind} entries have the id {number!r}")
        by_id[number] = row
    return by_id


def _read_categories(file: Path, rows: list[dict]) -> tuple[list[int | str], list[str]]:
    by_id = _unique(file, "category", rows)
    if not by_id:
        raise InputError(f"{file} names no category; expected at least one")
    ids = sorted(by_id, key=lambda number: (isinstance(number, str), number))
    return ids, [str(by_id[number].get("name", number)) for number in ids]


def _index_images(file: Path, rows: list[dict]) -> dict[Any, dict]:
    if not rows:
        raise InputError(f"{file} lists no image; expected at least one in a split")
    entries = _unique(file, "image", rows)
    for number, row in entries.items():
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise InputError(f"{file}: image {number!r} has no file_name")
        for side in ("width", "height"):
            if not _is_number(row.get(side)) or row[side] < 1:
                raise InputError(
                    f"{file}: image {number!r} has {side} {row.get(side)!r}; expected pixels"
                )
        if not isinstance(row.get("short_insertion", False), bool):
            raise InputError(
                f"{file}: image {number!r} has short_insertion {row['short_insertion']!r}; "
                "expected true or false"
            )
    return entries


def _image_entry(file: Path, folder: Path, row: dict, annotations: ImageAnnotations) -> ImageEntry:
    path = folder / row["file_name"]
    if not path.is_file():
        raise InputError(f"{file}: image {row['id']!r} names {path}, which does not exist")
    known = {"id", "file_name", "width", "height"}
    extra = {key: value for key, value in row.items() if key not in known}
    return ImageEntry(row["id"], path, int(row["width"]), int(row["height"]), annotations, extra)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_key(value: Any, table: Mapping[Any, Any]) -> bool:
    return isinstance(value, int | str) and value in table


class _Boxes:
    """Collects the annotations of each image and checks them on the way."""

    def __init__(self, file: Path, images: dict[Any, dict], labels: dict[Any, int]) -> None:
        self._file = file
        self._images = images
        self._labels = labels
        self._rows: dict[Any, list[tuple[list[float], int, bool]]] = {key: [] for key in images}

    def read(self, rows: list[dict]) -> None:
        clipped: list[Any] = []
        dropped: list[Any] = []
        for number, row in _unique(self._file, "annotation", rows).items():
            where = f"{self._file}: annotation {number!r}"
            image_id, category = row.get("image_id"), row.get("category_id")
            if not _is_key(image_id, self._images):
                raise InputError(f"{where} belongs to image {image_id!r}, which is not listed")
            if not _is_key(category, self._labels):
                known = ", ".join(str(key) for key in self._labels)
                raise InputError(f"{where} has category {category!r}; expected one of {known}")
            box = _corners(where, row.get("bbox"))
            inside = _clip(box, self._images[image_id])
            if inside is None:
                dropped.append(number)
                continue
            if any(abs(a - b) > 1.0 for a, b in zip(box, inside, strict=True)):
                clipped.append(number)
            self._rows[image_id].append((inside, self._labels[category], _is_crowd(where, row)))
        self._warn(clipped, dropped)

    def _warn(self, clipped: list[Any], dropped: list[Any]) -> None:
        kinds = {
            "clipped {} boxes that reach beyond their image": clipped,
            "dropped {} boxes wholly outside their image": dropped,
        }
        parts = [
            f"{what.format(len(numbers))} (first: annotation {numbers[0]!r})"
            for what, numbers in kinds.items()
            if numbers
        ]
        if parts:
            warnings.warn(f"{self._file}: {' and '.join(parts)}", stacklevel=4)

    def of_image(self, image_id: Any) -> ImageAnnotations:
        rows = self._rows[image_id]
        return ImageAnnotations(
            boxes=torch.tensor([box for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4),
            class_labels=torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
            iscrowd=torch.tensor([crowd for _, _, crowd in rows], dtype=torch.bool),
        )


def _is_crowd(where: str, row: dict) -> bool:
    value = row.get("iscrowd", 0)
    if value not in (0, 1):  # false and true are as good
        raise InputError(f"{where} has iscrowd {value!r}; expected 0 or 1")
    return bool(value)


def _corners(where: str, bbox: Any) -> list[float]:
    """COCO's [x, y, width, height] as [x0, y0, x1, y1]."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        raise InputError(f"{where} has bbox {bbox!r}; expected four finite numbers")
    x, y, width, height = (float(value) for value in bbox)
    if width <= 0 or height <= 0:
        raise InputError(f"{where} has bbox {bbox!r}; expected a positive width and height")
    return [x, y, x + width, y + height]


def _clip(box: list[float], image: dict) -> list[float] | None:
    """The part of a box inside its image, None where there is none."""
    limits = (image["width"], image["height"]) * 2
    x0, y0, x1, y1 = (min(max(v, 0.0), float(top)) for v, top in zip(box, limits, strict=True))
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None
