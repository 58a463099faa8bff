"""What a frozen teacher makes of a data set, kept on disk: distillation without running it.

Per image the cache holds query and key of the distilled layers, the log-sum-exp of their logits,
and the teacher's class logits and boxes: O(HW · d) numbers instead of the HW x HW of a map.

    manifest.json               what was computed, of what, by which teacher; checksums; comes last
    shard-00000.safetensors ... a fixed number of images each
    teacher/                    the teacher's configuration, image processor and backbone, so that a
                                student can start from the teacher without having it

A record is of one image processed *alone*, on its own grid of h x w cells without padding, whatever
batches a student will meet it in. So it depends on nothing but the image, and the loss of an image
on nothing but the image and the student. `attn_kd.training.teacher_cache_batches` lays records of
several sizes out in a padded batch. A teacher that runs on the padded batch itself computes the
same but for what its convolutions see beyond the border of a smaller image (padding that earlier
layers have turned into something, instead of zeros): the positions are encoded relative to the
visible cells, keys of padding are masked, and batch norm is frozen.

Query and key are rounded to the cache's dtype, and the log-sum-exp (float32) is that of the rounded
ones: of the attention map that the stored factors describe, the divergence is exact.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from attn_kd.data import Augmentation, CocoDetection
from attn_kd.errors import InputError
from attn_kd.training.config import read_json
from attn_kd.training.records import TeacherIdentity
from attn_kd.training.teacher_cache_format import (
    FORMAT,
    MANIFEST_FILE,
    TEACHER_FOLDER,
    VERSION,
    CacheRecipe,
    ImageRecord,
    LayerFactors,
    Shard,
    config_digest,
    described_image,
    file_sha256,
    plain_augmentation,
    processor_settings,
    require_intact,
    tensor_name,
)


class TeacherCache:
    """A complete cache on disk; opened by `TeacherCache.open`.

    Only paths and the manifest are held, so that processes which load data can have copies.
    """

    def __init__(
        self,
        folder: Path,
        recipe: CacheRecipe,
        shards: Sequence[Shard],
        teacher_files: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.shards = tuple(shards)
        self.teacher_files = dict(teacher_files)  # SHA-256 by name

    @classmethod
    def open(cls, folder: str | os.PathLike) -> TeacherCache:
        """Read the manifest; the files are checked by `verify`.

        Raises:
            InputError: there is no complete cache, or it is of a later version.
        """
        folder = Path(folder)
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise InputError(
                f"{folder} is no complete teacher cache: it has no {MANIFEST_FILE}; "
                "attn-kd cache-teacher makes one, or goes on with one that was interrupted"
            )
        values = read_json(path, dict)
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise InputError(
                f"{path} has format {values.get('format')!r}, version {values.get('version')!r}; "
                f"expected {FORMAT!r}, version {VERSION}"
            )
        try:
            recipe = CacheRecipe.from_dict(values["recipe"])
            shards = [Shard.from_dict(shard) for shard in values["shards"]]
            teacher_files = dict(values["teacher_files"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path} is broken: {type(error).__name__}: {error}") from None
        if len(shards) != recipe.num_shards:
            raise InputError(f"{path} is broken: {len(shards)} shards of {recipe.num_shards}")
        for number, shard in enumerate(shards):
            if not recipe.describes(shard, number):
                raise InputError(
                    f"{path} is broken: the grids of {shard.file!r} are not those of shard {number}"
                )
        for name, sha256 in teacher_files.items():
            if not isinstance(sha256, str) or Path(name).name != name:
                raise InputError(f"{path} is broken: teacher file {name!r} has SHA-256 {sha256!r}")
        return cls(folder, recipe, shards, teacher_files)

    @property
    def identity(self) -> TeacherIdentity:
        """The folder, and the SHA-256 of all that is in the cache, wherever its teacher was."""
        recipe = self.recipe.to_dict()
        del recipe["teacher"]["folder"]
        content = {
            "recipe": recipe,
            "teacher_files": self.teacher_files,
            "shards": [asdict(shard) for shard in self.shards],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return TeacherIdentity(str(self.folder.resolve()), digest)

    def teacher_folder(self) -> Path:
        """Where the teacher's configuration, image processor and backbone are, after a check.

        Raises:
            InputError: a file is missing or damaged; the message names it.
        """
        for name, sha256 in self.teacher_files.items():
            require_intact(self.folder / TEACHER_FOLDER / name, sha256)
        return self.folder / TEACHER_FOLDER

    def verify(
        self,
        dataset: Any = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> None:
        """Compare every shard, and every image of a data set, with its checksum.

        Args:
            dataset: one that `rows_of` takes.
            progress: wraps the iteration over the files.

        Raises:
            InputError: a shard is missing or damaged, or an image another one than the teacher saw;
                the message names the file.
        """
        entries = [] if dataset is None else dataset.image_entries
        seen = {image.image_id: image.sha256 for image in self.recipe.images}
        for part in progress([*self.shards, *entries]):
            if isinstance(part, Shard):
                require_intact(self.folder / part.file, part.sha256)
            elif file_sha256(part.path) != seen[part.image_id]:
                raise InputError(
                    f"image {part.image_id!r} ({part.path}) has another content than in the "
                    f"teacher cache {self.folder}; expected one made of this data"
                )

    def read(self, index: int, view: int = 0, layers: Sequence[str] | None = None) -> ImageRecord:
        """The record of one view of one image.

        Args:
            index: of the image in the recipe.
            view: 0 is the image as it is.
            layers: paths of those to read; ``None``: all.

        Raises:
            InputError: the shard cannot be read; the message names the file.
        """
        number, within = divmod(index, self.recipe.images_per_shard)
        shard = self.shards[number]
        path = self.folder / shard.file
        if layers is None:
            layers = [layer.path for layer in self.recipe.layers]
        try:
            with safe_open(path, framework="pt") as file:
                get = file.get_tensor
                factors = {
                    layer: LayerFactors(
                        *(get(tensor_name(index, view, layer, p)) for p in LayerFactors._fields)
                    )
                    for layer in layers
                }
                logits = get(tensor_name(index, view, "output", "logits"))
                boxes = get(tensor_name(index, view, "output", "boxes"))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is missing or damaged: {error}") from None
        return ImageRecord(factors, logits, boxes, shard.grids[within][view])

    def rows_of(self, dataset: Any) -> list[int]:
        """For every image of a data set its index in the cache.

        The data set may hold fewer images than the cache, or in another order. Of their files the
        names and sizes are compared; the content is for `verify`.

        Raises:
            InputError: an image is not in the cache, or not the one that the teacher saw.
        """
        if not isinstance(dataset, CocoDetection):
            raise InputError(
                f"a teacher cache cannot be used with a {type(dataset).__name__}; "
                "expected a COCO data folder"
            )
        known = {image.image_id: number for number, image in enumerate(self.recipe.images)}
        rows = []
        for entry in dataset.image_entries:
            row = known.get(entry.image_id)
            if row is None:
                raise InputError(
                    f"image {entry.image_id!r} ({entry.path.name}) of the data is not in the "
                    f"teacher cache {self.folder}; expected one made of this data"
                )
            cached = self.recipe.images[row]
            image = described_image(entry, cached.sha256)
            if image != cached:
                raise InputError(
                    f"image {image.image_id!r} is {image}; in the teacher cache "
                    f"{self.folder} it is {cached}; expected one made of this data"
                )
            rows.append(row)
        return rows

    def require_layers(self, paths: Iterable[str]) -> None:
        """Check that layers are in the cache.

        Raises:
            InputError: one is not.
        """
        held = [layer.path for layer in self.recipe.layers]
        for path in paths:
            if path not in held:
                raise InputError(
                    f"teacher layer {path!r} is not in the teacher cache {self.folder}, "
                    f"which holds {', '.join(held)}; expected a cache made with --layers {path}"
                )

    def require_teacher(self, folder: str | os.PathLike) -> None:
        """Check that a model folder holds the teacher of this cache, image processor included.

        Raises:
            InputError: it holds another one.
        """
        mine, theirs = self.recipe, TeacherIdentity.of(folder)
        differing = [
            what
            for what, same in {
                "weights": mine.teacher.sha256 == theirs.sha256,
                "config.json": mine.teacher_config == config_digest(folder),
                "image processor": mine.processor == processor_settings(folder),
            }.items()
            if not same
        ]
        if differing:
            raise InputError(
                f"the teacher cache {self.folder} is of another teacher than {folder}: other "
                f"{', '.join(differing)} (it is of {mine.teacher.folder})"
            )

    def require_augmentation(self, augment: bool) -> None:
        """Check that images are as they are in the cache.

        Raises:
            InputError: they are augmented at random and the cache holds them as they are, or
                augmented with other settings.
        """
        if augment and self.recipe.views == 1:
            raise InputError(
                f"augment is True but the teacher cache {self.folder} holds the images as they "
                "are; expected --no-augment, or a cache made with --views above 1"
            )
        now, made = plain_augmentation(Augmentation()), self.recipe.augmentation
        if augment and made != now:
            raise InputError(
                f"the views in the teacher cache {self.folder} are augmented with {made}; expected "
                f"{now}, or --no-augment"
            )

    def require_amp(self, amp: str) -> None:
        """Check that the teacher ran in full precision, or in that which a student is trained in.

        Raises:
            InputError: it ran in another one.
        """
        if self.recipe.amp not in ("none", amp):
            raise InputError(
                f"amp is {amp!r} but the teacher of the cache {self.folder} ran with amp "
                f"{self.recipe.amp!r}; expected the same, or a cache made with --amp {amp}"
            )
