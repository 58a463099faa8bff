"""Training steps of a student beside its running teacher, and with the teacher's cache instead.

Random images in files, loaded and prepared in every step, as a training does; a teacher with random
weights, whose last encoder layer is distilled. Three ways to train: the backbone learns; it is
frozen, and where the teacher runs, runs once for both models; its features are cached.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DetrForObjectDetection

from attn_kd import AttentionDistiller
from attn_kd.data import CocoDetection
from attn_kd.distill import distillation_loss
from attn_kd.models import (
    build_image_processor,
    freeze_backbone,
    load_backbone_weights,
    save_detector,
)
from attn_kd.training import CacheOptions, TeacherCache, TrainingConfig, cache_teacher
from attn_kd.training.backbone_forward import feature_maps_as_input
from attn_kd.training.sources import Source, Views, feature_source, image_source
from attn_kd.training.teacher import Teacher
from attn_kd.training.teacher_cache_batches import teacher_pass
from bench.detr import ALPHA, LEARNING_RATE, Setting, build_detector, scale_tokens
from bench.model_tables import CACHED
from bench.rounds import SUBJECT

LEARNS, FROZEN, FEATURES = WAYS = ("backbone learns", "backbone frozen", "features cached")
DTYPE = "float16"  # of query and key in the cache


class Example(NamedTuple):
    """What a training begins with."""

    setting: Setting
    teacher: Teacher
    cache: TeacherCache
    dataset: CocoDetection


def make_example(setting: Setting, root: Path) -> Example:
    """Write images and a teacher into a folder, and cache the teacher."""
    torch.manual_seed(0)
    _write_images(root / "data", setting.pixels, 2 * setting.batch)
    model = build_detector(setting, setting.teacher_layers).eval()
    scale_tokens(model)
    size = {"height": setting.pixels, "width": setting.pixels}
    processor = build_image_processor(setting.preset, image_size=size)
    save_detector(model, processor, root / "teacher")
    options = CacheOptions(dtype=DTYPE)
    cache = cache_teacher(root / "teacher", root / "data", root / "cache", options)
    dataset = CocoDetection(root / "data", "train")
    return Example(setting, Teacher.load(root / "teacher"), cache, dataset)


def sizes_of(cache: TeacherCache) -> dict[str, int]:
    """Bytes of one layer of one image in the cache, and of its maps if float32 ones were kept."""
    (layer,) = cache.recipe.layers
    record = cache.read(0)
    cells = math.prod(record.grid)
    return {
        "cells": cells,
        "heads": layer.heads,
        "layer_bytes": sum(tensor.nbytes for tensor in record.layers[layer.path]),
        "map_bytes": layer.heads * cells**2 * torch.float32.itemsize,
    }


def steps_of(way: str, example: Example) -> dict[str, DistillationStep]:
    """Steps of two students that begin alike and see the same batches.

    That of `SUBJECT` has its teacher running, that of `CACHED` reads the teacher's records.
    """
    torch.manual_seed(1)
    student = build_detector(example.setting, 1).eval()  # so that the backbone stays the teacher's
    load_backbone_weights(student, example.teacher.model)
    scale_tokens(student)
    if way != LEARNS:
        freeze_backbone(student)
    given = {SUBJECT: example.teacher, CACHED: Teacher.cached(example.cache.folder)}
    source = _source(way, student, example)
    return {
        name: DistillationStep(way, copy.deepcopy(student), teacher, source, example)
        for name, teacher in given.items()
    }


class DistillationStep:
    """Training steps: load a batch, forward, backward, AdamW. Called, returns the divergence."""

    def __init__(
        self,
        way: str,
        student: DetrForObjectDetection,
        teacher: Teacher,
        source: Source,
        example: Example,
    ) -> None:
        self._student = student.train()
        self._teacher = teacher
        layers = [layer.path for layer in example.cache.recipe.layers]
        source = teacher.taught(source, example.dataset, layers)
        self._batches = _batches(source, example.setting.batch)
        self._shares_backbone = way == FROZEN and teacher.cache is None
        learning = [p for p in student.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE)

    def __call__(self) -> Tensor:
        batch, given = next(self._batches), None
        cache = self._teacher.cache
        models = [self._student] if cache else [self._student, self._teacher.model]
        with (
            feature_maps_as_input(*models),
            AttentionDistiller(self._teacher.model, self._student) as distiller,
        ):
            if cache is not None:
                batch, given = teacher_pass(batch, cache.recipe.layers)
            if self._shares_backbone:
                batch = self._with_features(batch)
            result = distiller.run(batch, teacher_pass=given)
            loss = distillation_loss(result, alpha=ALPHA)
            self._optimizer.zero_grad()
            loss.total.backward()
        self._optimizer.step()
        return loss.attention_kl.detach()

    @torch.no_grad()
    def _with_features(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the backbone's last features in the place of its images."""
        backbone = self._student.model.backbone
        features, mask = backbone(batch["pixel_values"], batch["pixel_mask"])[-1]
        return {**batch, "pixel_values": features, "pixel_mask": mask}


def _source(way: str, student: DetrForObjectDetection, example: Example) -> Source:
    config = TrainingConfig(
        preset=example.setting.preset,
        augment=False,
        freeze_backbone=way != LEARNS,
        cache_features=way == FEATURES,
    )
    dataset, processor, views = example.dataset, example.teacher.processor, Views(1, 0)
    if config.cache_features:
        return feature_source(student, dataset, processor, config, views=views)
    return image_source(dataset, processor, config, views)


def _batches(source: Source, size: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        indices = torch.randint(len(source.dataset), (size,), generator=generator)
        yield source.collate([source.dataset[int(index)] for index in indices])


def _write_images(root: Path, side: int, count: int) -> None:
    """Square pictures of noise with one box each, as a COCO folder."""
    generator = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, boxes = [], []
    for number in range(count):
        name = f"{number:04d}.png"
        pixels = generator.integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
        images.append({"id": number, "file_name": name, "width": side, "height": side})
        boxes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 40, 30]})
    categories = [{"id": 1, "name": "needle"}]
    document = {"images": images, "annotations": boxes, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(document))
