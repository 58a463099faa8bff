"""What a training reads: images augmented anew in every epoch, or features cached once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_kd.data import Augmentation, CocoDetection, DetectionCollator, annotation_file
from attn_kd.errors import InputError
from attn_kd.training.backbone_forward import computes_bf16
from attn_kd.training.config import TrainingConfig
from attn_kd.training.datasets import DetectionDataset, DetectionStream, is_stream
from attn_kd.training.feature_cache import (
    Collator,
    FeatureCollator,
    cache_features,
    require_shared_backbone,
)
from attn_kd.training.sampling import SeededItems, ViewedItems

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection
    from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class TrainingData:
    """What a detector is trained on and, where there is a validation split, measured on."""

    train: DetectionDataset | DetectionStream
    val: DetectionDataset | None = None

    @classmethod
    def open(cls, root: str | os.PathLike) -> TrainingData:
        """The splits ``train`` and, if it has one, ``val`` of a COCO data folder.

        Raises:
            InputError: the folder or one of its entries is broken.
        """
        has_val = annotation_file(root, "val").is_file()
        return cls(CocoDetection(root, "train"), CocoDetection(root, "val") if has_val else None)


@dataclass(frozen=True)
class Source:
    """A data set and what makes batches of its items."""

    dataset: Any
    collate: Collator


class Views(NamedTuple):
    """How many views there are of an image (as it is, the others augmented), and of which seed."""

    number: int
    seed: int


def image_source(
    dataset: DetectionDataset | DetectionStream,
    processor: BaseImageProcessor,
    config: TrainingConfig,
    views: Views | None = None,
) -> Source:
    """Images, augmented if the configuration says so.

    Args:
        views: those there are to choose from; ``None``: a new one in every epoch.

    Raises:
        InputError: a stream of images without an end to the training.
    """
    collate = DetectionCollator(processor, Augmentation() if config.augment else None)
    if is_stream(dataset):
        if config.max_steps is None:
            raise InputError("max_steps is None; expected a number, a stream has no epochs")
        return Source(dataset, collate)
    if views is not None:
        return Source(ViewedItems(dataset, views=views.number, seed=views.seed), collate)
    return Source(SeededItems(dataset, config.seed), collate)


def feature_source(
    model: DetrForObjectDetection,
    dataset: DetectionDataset | DetectionStream,
    processor: BaseImageProcessor,
    config: TrainingConfig,
    *,
    teacher: DetrForObjectDetection | None = None,
    views: Views | None = None,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Source:
    """The features that the frozen backbone of ``model`` makes of the images.

    View 0 is the image as it is, the others are augmented.

    Args:
        teacher: must have the same backbone.
        views: of each image; ``None``: as many as the configuration says, of its seed.
        folder: where features are kept for further runs; ``None`` for in memory.
        device: where the backbone runs.
        progress: wraps the iteration over the images.

    Raises:
        InputError: the teacher has another backbone, or the images come in a stream.
    """
    if is_stream(dataset):
        raise InputError("cache_features is True; expected a data folder, not a stream of images")
    if teacher is not None:
        require_shared_backbone(model, teacher)
    if views is None:
        views = Views(config.cache_views if config.augment else 1, config.seed)
    collators = [DetectionCollator(processor)]
    collators += [DetectionCollator(processor, Augmentation())] * (views.number - 1)
    in_bf16 = config.amp == "bf16-backbone" and computes_bf16(device)
    precision = "bf16" if in_bf16 else "float32"
    cached = cache_features(
        model,
        dataset,
        collators,
        seed=views.seed,
        folder=folder,
        key=None if folder is None else _what_features_depend_on(dataset, processor, precision),
        device=device,
        progress=progress,
    )
    return Source(cached, FeatureCollator())


def _what_features_depend_on(
    dataset: DetectionDataset, processor: BaseImageProcessor, precision: str
) -> dict[str, Any]:
    """Besides the backbone: the images by name, size and time, and all that is done to them."""
    if not isinstance(dataset, CocoDetection):
        raise InputError(
            f"cannot keep features of a {type(dataset).__name__} in a folder; "
            "expected a COCO data folder, or features in memory"
        )
    digest = hashlib.sha256()
    for entry in dataset.image_entries:
        status = entry.path.stat()
        digest.update(f"{entry.path} {status.st_size} {status.st_mtime_ns}".encode())
        digest.update(entry.annotations.boxes.numpy().tobytes())
        digest.update(entry.annotations.class_labels.numpy().tobytes())
    return {
        "images": digest.hexdigest(),
        "processor": processor.to_json_string(),
        "augmentation": asdict(Augmentation()),
        "precision": precision,
    }
