"""What a teacher cache consists of: its recipe, its records, and how they are named and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_kd.data import CocoDetection
from attn_kd.errors import InputError
from attn_kd.training.config import read_json
from attn_kd.training.records import TeacherIdentity

FORMAT = "attn_kd teacher cache"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TEACHER_FOLDER = "teacher"

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Grid = tuple[int, int]  # height and width in cells


@dataclass(frozen=True)
class CachedLayer:
    """A layer of the teacher.

    Attributes:
        path: of its attention module.
        heads, head_dim: of query and key.
        scale: factor on the logits; ``None``: ``head_dim ** -0.5``.
        grid_queries, grid_keys: whether the queries, the keys, are the cells of the image; else
            they are the decoder's object queries, as many for every image.
    """

    path: str
    heads: int
    head_dim: int
    scale: float | None
    grid_queries: bool
    grid_keys: bool


@dataclass(frozen=True)
class CachedImage:
    """An image file: what it must be for its record to be valid; sizes in pixels and bytes."""

    image_id: int | str
    file_name: str
    width: int
    height: int
    file_bytes: int

    def __str__(self) -> str:
        return f"{self.file_name}, {self.width} x {self.height}, {self.file_bytes} bytes"


@dataclass(frozen=True)
class CacheRecipe:
    """All that the content of a cache depends on.

    Attributes:
        teacher: folder and SHA-256 of the weights.
        teacher_config: SHA-256 of its ``config.json``.
        processor: the image processor, as in ``preprocessor_config.json``.
        split: of the data folder.
        layers: what is kept of the teacher.
        dtype: of query and key, one of `DTYPES`.
        amp: mixed precision that the teacher ran in.
        views: of each image: as it is, the others augmented.
        seed: of the augmentation.
        augmentation: its settings; ``None`` where there is one view.
        stride: pixels a cell is wide and high.
        images_per_shard: of all shards but the last.
        images: in the order of the records.
    """

    teacher: TeacherIdentity
    teacher_config: str
    processor: Mapping[str, Any]
    split: str
    layers: tuple[CachedLayer, ...]
    dtype: str
    amp: str
    views: int
    seed: int
    augmentation: Mapping[str, Any] | None
    stride: int
    images_per_shard: int
    images: tuple[CachedImage, ...]

    @property
    def num_shards(self) -> int:
        return -(-len(self.images) // self.images_per_shard)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheRecipe:
        """Raises TypeError or KeyError where the values are no recipe."""
        nested = {
            "teacher": TeacherIdentity(**values["teacher"]),
            "layers": tuple(CachedLayer(**layer) for layer in values["layers"]),
            "images": tuple(CachedImage(**image) for image in values["images"]),
        }
        return cls(**{**values, **nested})


@dataclass(frozen=True)
class Shard:
    """A file of records: its SHA-256, and the grid of every view of every image in it."""

    file: str
    sha256: str
    grids: tuple[tuple[Grid, ...], ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Shard:
        grids = tuple(tuple((int(h), int(w)) for h, w in views) for views in values["grids"])
        return cls(str(values["file"]), str(values["sha256"]), grids)


class LayerFactors(NamedTuple):
    """What is kept of one layer for one image."""

    query: Tensor  # [Ht, Lq, Dt], the cache's dtype
    key: Tensor  # [Ht, Lk, Dt], the cache's dtype
    lse: Tensor  # [Ht, Lq] float32, of query and key as they are here


class ImageRecord(NamedTuple):
    """What the teacher made of one view of one image."""

    layers: dict[str, LayerFactors]  # by path; cells in rows, row by row
    logits: Tensor  # [num_queries, classes + 1] float32
    boxes: Tensor  # [num_queries, 4] float32: centre x, centre y, width, height; relative
    grid: Grid


def tensor_name(index: int, view: int, owner: str, part: str) -> str:
    """The name of a tensor in its shard; `owner` is a layer's path, or "output"."""
    return f"{index}.{view}.{owner}.{part}"


def described_images(dataset: CocoDetection) -> tuple[CachedImage, ...]:
    """What identifies the images of a split, in its order."""
    return tuple(
        CachedImage(
            entry.image_id, entry.path.name, entry.width, entry.height, entry.path.stat().st_size
        )
        for entry in dataset.image_entries
    )


def config_digest(teacher: str | os.PathLike) -> str:
    """SHA-256 of the ``config.json`` of a model folder, whatever its layout."""
    values = read_json(Path(teacher) / "config.json", dict)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def processor_settings(teacher: str | os.PathLike) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a model folder."""
    return read_json(Path(teacher) / "preprocessor_config.json", dict)


def require_intact(path: Path, sha256: str) -> None:
    """Compare a file with its checksum.

    Raises:
        InputError: it is missing, or another one.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if digest.hexdigest() != sha256:
        found = digest.hexdigest()
        raise InputError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {sha256[:12]}…; the same "
            "attn-kd cache-teacher as before computes it anew"
        )
