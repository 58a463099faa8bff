"""The teacher of a training: it runs beside the student, or a cache has what it made of images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from attn_kd.distill.layers import pair_layers
from attn_kd.models import load_detector
from attn_kd.training.config import TrainingConfig
from attn_kd.training.records import TeacherIdentity
from attn_kd.training.sources import Source, Views
from attn_kd.training.teacher_cache import TeacherCache
from attn_kd.training.teacher_cache_batches import TaughtCollator, TaughtItems
from attn_kd.training.teacher_cache_model import load_skeleton

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection
    from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class Teacher:
    """A trained detector and its image processor.

    Attributes:
        model: with a cache, its layers and its backbone's weights only: it cannot run.
        cache: what it has made of the images; ``None`` where it runs itself.
    """

    model: DetrForObjectDetection
    processor: BaseImageProcessor
    identity: TeacherIdentity
    cache: TeacherCache | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Teacher:
        """The teacher in a model folder.

        Raises:
            InputError: there is none.
        """
        model, processor = load_detector(folder)
        return cls(model, processor, TeacherIdentity.of(folder))

    @classmethod
    def cached(cls, folder: Path, teacher: str | os.PathLike | None = None) -> Teacher:
        """The teacher of a cache.

        Args:
            folder: of the cache.
            teacher: the model folder that it should be of, if that is there.

        Raises:
            InputError: there is no complete cache, or it is of another teacher.
        """
        cache = TeacherCache.open(folder)
        if teacher is not None:
            cache.require_teacher(teacher)
        model, processor = load_skeleton(cache.teacher_folder())
        return cls(model, processor, cache.recipe.teacher, cache)

    def views(self, *, augment: bool) -> Views | None:
        """The views of an image there are to train on; ``None`` where the teacher sees any.

        Raises:
            InputError: a cache has no augmented ones, or other ones, and they are asked for.
        """
        if self.cache is None:
            return None
        self.cache.require_augmentation(augment)
        return Views(self.cache.recipe.views if augment else 1, self.cache.recipe.seed)

    def taught(self, source: Source, dataset: Any, layers: Iterable[str]) -> Source:
        """A source with the cached records of its images; without a cache, the source as it is.

        Args:
            source: of images in the `views` of this teacher, or of their features.
            dataset: its images.
            layers: paths of the teacher's layers that the student learns from.

        Raises:
            InputError: an image or a layer is not in the cache.
        """
        if self.cache is None:
            return source
        recipe, layers = self.cache.recipe, list(layers)
        self.cache.require_layers(layers)
        items = TaughtItems(source.dataset, self.cache, self.cache.rows_of(dataset), layers)
        features = hasattr(source.dataset, "store")
        collate = TaughtCollator(source.collate, recipe.layers, recipe.stride, features=features)
        return Source(items, collate)


def distilled_layers(
    student: nn.Module, teacher: nn.Module, config: TrainingConfig
) -> dict[str, str]:
    """Which layers of the student learn from which of the teacher's, by path."""
    pairs = pair_layers(student, teacher, config.layers, config.kinds)
    return {pair.student_path: pair.teacher_path for pair in pairs}
