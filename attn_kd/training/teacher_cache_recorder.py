"""Runs a teacher over a data set, once, for a cache of what it makes of the images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_kd.data import Augmentation, CocoDetection, DetectionCollator
from attn_kd.distill import TeacherRecorder
from attn_kd.distill.layers import attention_at, check_selection
from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import attention_kinds, layers_of_kind
from attn_kd.models import load_detector
from attn_kd.nn.taps import AttentionRecord
from attn_kd.ops import attention
from attn_kd.training.backbone_forward import bf16_backbone, feature_maps_as_input
from attn_kd.training.config import MIXED_PRECISIONS
from attn_kd.training.records import TeacherIdentity
from attn_kd.training.sampling import ViewedItems
from attn_kd.training.teacher_cache import TeacherCache
from attn_kd.training.teacher_cache_batches import padded_to_stride
from attn_kd.training.teacher_cache_format import (
    DTYPES,
    CachedLayer,
    CacheRecipe,
    Grid,
    ImageRecord,
    LayerFactors,
    config_digest,
    described_images,
    plain_augmentation,
    processor_settings,
)
from attn_kd.training.teacher_cache_model import teacher_files, token_stride
from attn_kd.training.teacher_cache_writer import Progress, write_cache

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection


@dataclass(frozen=True)
class CacheOptions:
    """What a cache holds, and in which precision.

    Attributes:
        split: of the data folder.
        layers: "last", "all", or paths of attention modules of the teacher.
        kinds: kinds of layers that "last" and "all" choose from.
        dtype: of query and key: "float16", "bfloat16" or "float32".
        amp: mixed precision of the teacher, as of a training with the live teacher; unless it is
            "none", that from the cache must have the same.
        views: of each image: as it is, the others augmented.
        seed: of the augmentation.
        images_per_shard: in a file.

    Raises:
        InputError: a value is refused.
    """

    split: str = "train"
    layers: str | Sequence[str] = "last"
    kinds: Sequence[str] = ("encoder_self",)
    dtype: str = "float16"
    amp: str = "none"
    views: int = 1
    seed: int = 0
    images_per_shard: int = 32

    def __post_init__(self) -> None:
        for name, choices in {"dtype": tuple(DTYPES), "amp": MIXED_PRECISIONS}.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )
        for name in ("views", "images_per_shard"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if isinstance(self.layers, str):
            check_selection(self.layers, self.kinds)


def cache_teacher(
    teacher: str | os.PathLike,
    data: str | os.PathLike,
    out: str | os.PathLike,
    options: CacheOptions | None = None,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress = iter,
) -> TeacherCache:
    """Run a teacher over a split, image by image, and keep what a student learns from.

    A folder that holds part of the same cache is completed.

    Args:
        teacher: a model folder.
        data: a COCO data folder.
        out: becomes the cache.
        device: where the teacher runs.
        overwrite: replace another cache in ``out``.
        progress: wraps the iteration over the images, e.g. by a progress bar.

    Raises:
        InputError: the teacher, the data, the options or the folder cannot be used, or a value of
            the teacher does not fit into the dtype.
        KeyboardInterrupt: Ctrl-C; the message says how to go on.
    """
    options = options or CacheOptions()
    model, processor = load_detector(teacher)
    files = teacher_files(teacher, model)
    dataset = CocoDetection(data, options.split)
    items = ViewedItems(dataset, views=options.views, seed=options.seed)
    augmentation = Augmentation() if options.views > 1 else None
    collate = DetectionCollator(processor, augmentation)
    paths = _chosen_layers(model, options)
    stride = token_stride(model.config)
    with _Recorder(model.to(device), paths, stride, options) as recorder:
        recipe = CacheRecipe(
            teacher=TeacherIdentity.of(teacher),
            teacher_config=config_digest(teacher),
            processor=processor_settings(teacher),
            split=options.split,
            layers=recorder.describe(collate([items.item(0, 0)])),
            dtype=options.dtype,
            amp=options.amp,
            views=options.views,
            seed=options.seed,
            augmentation=None if augmentation is None else plain_augmentation(augmentation),
            stride=stride,
            images_per_shard=options.images_per_shard,
            images=described_images(dataset),
        )
        return write_cache(
            Path(out),
            recipe,
            files,
            lambda index, view: recorder.record(collate([items.item(index, view)])),
            overwrite=overwrite,
            progress=progress,
        )


def _chosen_layers(teacher: DetrForObjectDetection, options: CacheOptions) -> list[str]:
    """Paths of the layers to keep."""
    if not isinstance(options.layers, str):
        for path in options.layers:
            attention_at(teacher, path, "teacher")
        return list(dict.fromkeys(options.layers))
    start = -1 if options.layers == "last" else 0
    return [path for kind in options.kinds for path in layers_of_kind(teacher, kind)[start:]]


class _Recorder:
    """Runs the teacher on batches of one image; a context manager, as the teacher is changed."""

    def __init__(
        self,
        model: DetrForObjectDetection,
        paths: Sequence[str],
        stride: int,
        options: CacheOptions,
    ) -> None:
        self._model = model
        self._stride = stride
        self._dtype = DTYPES[options.dtype]
        self._amp = options.amp
        self._kinds = attention_kinds(model)
        self._changes = contextlib.ExitStack()
        self._run = self._changes.enter_context(TeacherRecorder(model, paths))
        if options.amp == "bf16-backbone":
            self._changes.enter_context(bf16_backbone(model))
        self._changes.enter_context(feature_maps_as_input(model))

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._changes.close()

    def describe(self, batch: dict[str, Any]) -> tuple[CachedLayer, ...]:
        """What the layers are, by what they make of an image."""
        taken, _ = self._pass(batch)
        described = []
        for path, record in taken.records.items():
            _, heads, _, head_dim = record.query.shape
            kind = self._kinds[path]
            described.append(
                CachedLayer(
                    path,
                    heads,
                    head_dim,
                    record.scale,
                    grid_queries=kind == "encoder_self",
                    grid_keys=kind != "decoder_self",
                )
            )
        return tuple(described)

    def record(self, batch: dict[str, Any]) -> ImageRecord:
        """The record of the image, on the CPU.

        Raises:
            InputError: a value is not finite, or does not fit into the dtype.
        """
        taken, mask = self._pass(batch)
        layers = {path: self._factors(path, record, mask) for path, record in taken.records.items()}
        logits, boxes = (x[0].float().cpu() for x in (taken.output.logits, taken.output.pred_boxes))
        return ImageRecord(layers, logits, boxes, _visible(mask))

    @torch.no_grad()
    def _pass(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        """The teacher's pass, and which cells [h, w] are not padding."""
        device = self._model.device
        batch = padded_to_stride(batch, self._stride)
        pixels, mask = batch["pixel_values"].to(device), batch["pixel_mask"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._amp == "bf16"):
            features, cells = self._model.model.backbone(pixels, mask)[-1]
            taken = self._run({"pixel_values": features, "pixel_mask": cells})
        expected = tuple(-(-side // self._stride) for side in pixels.shape[-2:])
        if features.shape[-2:] != expected:
            raise InputError(
                f"the backbone turns {tuple(pixels.shape[-2:])} pixels into "
                f"{tuple(features.shape[-2:])} cells; expected {expected}, at a stride of "
                f"{self._stride}"
            )
        return taken, cells[0]

    def _factors(self, path: str, record: AttentionRecord, mask: Tensor) -> LayerFactors:
        """Query and key of the visible cells, rounded, and the LSE of the rounded ones."""
        kind = self._kinds[path]
        round_to = partial(_rounded, path, self._dtype)
        query = _cropped(record.query, mask) if kind == "encoder_self" else record.query
        key = _cropped(record.key, mask) if kind != "decoder_self" else record.key
        query, key = round_to("query", query), round_to("key", key)
        wide = key.float()
        # The value is of no interest: one of its columns is the least there can be.
        _, lse = attention(query.float(), wide, wide[..., :1].contiguous(), scale=record.scale)
        return LayerFactors(query[0].cpu(), key[0].cpu(), lse[0].cpu())


def _visible(mask: Tensor) -> Grid:
    """Height and width of the cells [h, w] that are not padding, a rectangle at the top left."""
    return int(mask.any(1).sum()), int(mask.any(0).sum())


def _cropped(tokens: Tensor, mask: Tensor) -> Tensor:
    """The visible ones of tokens [1, Ht, h * w, D]."""
    height, width = _visible(mask)
    cells = tokens.unflatten(2, mask.shape)
    return cells[:, :, :height, :width].flatten(2, 3)


def _rounded(path: str, dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    rounded = tensor.to(dtype).contiguous()
    if not rounded.isfinite().all():
        largest = tensor.abs().max().item()
        raise InputError(
            f"teacher layer {path!r}: {name} reaches {largest:g}, which {dtype} does not hold; "
            "expected --dtype bfloat16, or a teacher whose weights are finite"
        )
    return rounded
