"""The model of a run before its first step, and a rehearsal before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_kd.data import DetectionCollator
from attn_kd.distill import AttentionDistiller, distillation_loss
from attn_kd.errors import InputError
from attn_kd.models import (
    build_detr,
    build_image_processor,
    get_preset,
    load_backbone_weights,
)
from attn_kd.training.config import TrainingConfig
from attn_kd.training.datasets import (
    DetectionDataset,
    DetectionStream,
    is_stream,
    most_objects,
)
from attn_kd.training.sources import image_source
from attn_kd.training.teacher import Teacher, distilled_layers
from attn_kd.training.teacher_cache_batches import teacher_pass

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection
    from transformers.image_processing_utils import BaseImageProcessor


def untrained_detector(
    config: TrainingConfig, dataset: DetectionDataset | DetectionStream, teacher: Teacher | None
) -> tuple[DetrForObjectDetection, BaseImageProcessor]:
    """The model as training finds it, and the processor of its images: the teacher's if any.

    Raises:
        InputError: the settings do not fit each other, the data or the teacher.
    """
    overrides: dict[str, Any] = {"auxiliary_loss": config.auxiliary_loss}
    if config.dropout is not None:
        overrides["dropout"] = config.dropout
    model = build_detr(
        config.preset,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        num_queries=_num_queries(config, dataset, teacher),
        num_labels=len(dataset.categories),
        id2label=dict(enumerate(dataset.categories)),
        **overrides,
    )
    if teacher is not None and config.teacher_backbone:
        load_backbone_weights(model, teacher.model)
    elif config.freeze_backbone and not config.pretrain_backbone_steps:
        raise InputError(
            "freeze_backbone is True but nothing has trained the backbone; "
            "expected pretrain_backbone_steps above 0, or a teacher's backbone"
        )
    if teacher is not None:
        _require_image_size(config, teacher.processor)
        return model, teacher.processor
    size = None
    if config.image_size is not None:
        size = dict.fromkeys(get_preset(config.preset).image_size, config.image_size)
    return model, build_image_processor(config.preset, image_size=size)


def rehearse(
    config: TrainingConfig,
    model: DetrForObjectDetection,
    processor: BaseImageProcessor,
    dataset: DetectionDataset | DetectionStream,
    teacher: Teacher | None,
) -> None:
    """Take one image through all that training does, but learn nothing from it.

    Whatever does not fit (an image, the teacher's grid, heads or classes) shows here, before a
    folder is touched. Neither the models nor any random state are changed.

    Raises:
        InputError: something does not fit.
    """
    given = None
    if teacher is None or teacher.cache is None:
        batch = DetectionCollator(processor)(
            [next(iter(dataset)) if is_stream(dataset) else dataset[0]]
        )
    elif is_stream(dataset):
        raise InputError("a teacher cache is of the images of a data folder, not of a stream")
    else:
        images = image_source(dataset, processor, config, teacher.views(augment=config.augment))
        layers = distilled_layers(model, teacher.model, config)
        taught = teacher.taught(images, dataset, layers.values())
        batch = taught.collate([taught.dataset[0]])
        batch, given = teacher_pass(batch, teacher.cache.recipe.layers)
    if teacher is None:
        return
    if config.class_weight > 0:
        _require_same_classes(teacher.model, dataset)
    was_training = model.training
    model.eval()  # so that neither dropout nor batch statistics take part
    try:
        distiller = AttentionDistiller(teacher.model, model, **config.distiller_options)
        with torch.no_grad(), distiller:
            distillation_loss(
                distiller.run(batch, teacher_pass=given),
                alpha=config.alpha,
                temperature=config.temperature,
                class_weight=config.class_weight,
            )
    finally:
        model.train(was_training)


def _num_queries(
    config: TrainingConfig, dataset: DetectionDataset | DetectionStream, teacher: Teacher | None
) -> int | None:
    """As configured; else the teacher's; else what the data needs; else the preset's.

    For one object an image there is one query (Rubin et al. 2021): with nothing to compete for it
    converges several times faster. For more, DETR wants clearly more queries than objects.
    """
    if config.num_queries is not None:
        return config.num_queries
    if teacher is not None:
        return teacher.model.config.num_queries
    if is_stream(dataset):
        return None
    most = most_objects(dataset)
    return 1 if most <= 1 else 2 * most


def _require_image_size(config: TrainingConfig, processor: BaseImageProcessor) -> None:
    size = dict(processor.size)
    if config.image_size is not None and set(size.values()) != {config.image_size}:
        described = ", ".join(f"{name} {value}" for name, value in size.items())
        raise InputError(
            f"image_size is {config.image_size}, the teacher's is {described}; "
            "a student sees images as its teacher does: leave image_size out"
        )


def _require_same_classes(
    teacher: DetrForObjectDetection, dataset: DetectionDataset | DetectionStream
) -> None:
    """The class term compares class by class, so both need the same ones in the same order."""
    known = [teacher.config.id2label[label] for label in range(teacher.config.num_labels)]
    if known != dataset.categories:
        raise InputError(
            f"class_weight is above 0 but the teacher detects {', '.join(known)} and the data has "
            f"{', '.join(dataset.categories)}; expected the same classes"
        )
