"""What a teacher cache consists of: its recipe, its records, and how they are named and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from attn_kd.data import Augmentation, CocoDetection, ImageEntry
from attn_kd.errors import InputError
from attn_kd.training.config import MIXED_PRECISIONS, read_json
from attn_kd.training.records import TeacherIdentity

FORMAT = "attn_kd teacher cache"
VERSION = 2
MANIFEST_FILE = "manifest.json"
TEACHER_FOLDER = "teacher"

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Grid = tuple[int, int]  # height and width in cells

T = TypeVar("T")


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
    """An image file: what it must be for its record to be valid; sizes in pixels and bytes.

    The SHA-256 is of the file: pictures of one size fill as many bytes where they are uncompressed.
    """

    image_id: int | str
    file_name: str
    width: int
    height: int
    file_bytes: int
    sha256: str

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
        """The recipe that `to_dict` has described.

        Raises:
            KeyError, TypeError, ValueError: the values are no recipe.
        """
        nested = {
            "teacher": _typed(TeacherIdentity, values["teacher"]),
            "layers": tuple(_typed(CachedLayer, layer) for layer in values["layers"]),
            "images": tuple(_typed(CachedImage, image) for image in values["images"]),
        }
        recipe = _typed(cls, {**values, **nested})
        for name, choices in {"dtype": tuple(DTYPES), "amp": MIXED_PRECISIONS}.items():
            if getattr(recipe, name) not in choices:
                raise ValueError(f"{name} is {getattr(recipe, name)!r}")
        for name, least in {"views": 1, "seed": 0, "stride": 1, "images_per_shard": 1}.items():
            if getattr(recipe, name) < least:
                raise ValueError(f"{name} is {getattr(recipe, name)}; expected at least {least}")
        return recipe

    def describes(self, shard: Shard, number: int) -> bool:
        """Whether a shard has the name and as many grids as the one of this number should have."""
        start = number * self.images_per_shard
        images = min(self.images_per_shard, len(self.images) - start)
        return shard.file == shard_file(number) and (
            [len(grids) for grids in shard.grids] == [self.views] * images
        )


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


def shard_file(number: int) -> str:
    """The name of a shard."""
    return f"shard-{number:05d}.safetensors"


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


def _typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of values that JSON can hold, each of the type that its field is annotated with.

    Raises:
        TypeError: a value is missing, of another type, or of no field.
    """
    made = kind(**values)
    for name, hint in get_type_hints(kind).items():
        value, types = getattr(made, name), _plain_types(hint)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join(each.__name__ for each in types)
            raise TypeError(f"{name} is {value!r}; expected {expected}")
    return made


def _plain_types(hint: Any) -> tuple[type, ...]:
    """What `isinstance` can check of an annotation; an integer is a float, too."""
    if isinstance(hint, UnionType):
        return tuple(plain for part in get_args(hint) for plain in _plain_types(part))
    return (float, int) if hint is float else (get_origin(hint) or hint,)


def tensor_name(index: int, view: int, owner: str, part: str) -> str:
    """The name of a tensor in its shard; `owner` is a layer's path, or "output"."""
    return f"{index}.{view}.{owner}.{part}"


def described_images(dataset: CocoDetection) -> tuple[CachedImage, ...]:
    """What identifies the images of a split, in its order; reads their files."""
    return tuple(described_image(entry, file_sha256(entry.path)) for entry in dataset.image_entries)


def described_image(entry: ImageEntry, sha256: str) -> CachedImage:
    """What identifies an image whose file has a SHA-256 that is known, or not in question."""
    file_bytes = entry.path.stat().st_size
    return CachedImage(
        entry.image_id, entry.path.name, entry.width, entry.height, file_bytes, sha256
    )


def plain_augmentation(augmentation: Augmentation) -> dict[str, Any]:
    """The settings as they come back from JSON, with lists for tuples."""
    settings = dataclasses.asdict(augmentation)
    return {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}


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
    found = file_sha256(path)
    if found != sha256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {sha256[:12]}…; the same "
            "attn-kd cache-teacher as before computes it anew"
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()
