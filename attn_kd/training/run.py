"""Whole trainings: from a configuration and a data folder to a model folder."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed

from attn_kd.errors import InputError
from attn_kd.models import (
    build_detr,
    build_image_processor,
    freeze_backbone,
    get_preset,
    load_backbone_weights,
    load_detector,
    save_detector,
)
from attn_kd.training.arguments import training_arguments
from attn_kd.training.backbone_forward import bf16_backbone, feature_maps_as_input
from attn_kd.training.callbacks import (
    EpochAnnouncer,
    HistoryWriter,
    ProgressBar,
    StopOnInterrupt,
    TensorBoard,
)
from attn_kd.training.config import TrainingConfig, read_json
from attn_kd.training.datasets import is_stream, most_objects
from attn_kd.training.evaluation import detection_metrics
from attn_kd.training.pretrain import DenseObjectness
from attn_kd.training.records import HISTORY_FILE, RunFolder, RunRecord, TeacherIdentity
from attn_kd.training.sources import Source, TrainingData, feature_source, image_source
from attn_kd.training.trainer import DistillationTrainer

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection
    from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class TrainingRun:
    """A finished training.

    Attributes:
        folder: the model folder; also holds ``training.json`` and ``history.json``.
        config: the settings.
        model: the trained detector, on the CPU, in evaluation mode.
        processor: its image processor.
        history: what ``history.json`` holds, see :func:`~attn_kd.training.records.history_entries`.
        seconds: wall time of this call, without what was done before it was resumed.
    """

    folder: Path
    config: TrainingConfig
    model: DetrForObjectDetection
    processor: BaseImageProcessor
    history: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class RunOptions:
    """How a training is run, as opposed to what it arrives at.

    Attributes:
        resume: go on from the last checkpoint in the folder.
        overwrite: start anew in a folder that holds a run or a model.
        device: ``None`` for the GPU if there is one.
        feature_folder: where cached features are kept for further runs; ``None``: in memory.
        progress: show bars on stderr.
        title: names the run in the bars.
    """

    resume: bool = False
    overwrite: bool = False
    device: torch.device | str | None = None
    feature_folder: Path | None = None
    progress: bool = False
    title: str = ""


def train_detector(
    config: TrainingConfig,
    data: TrainingData | str | os.PathLike,
    out: str | os.PathLike,
    **options: Any,
) -> TrainingRun:
    """Train a detector from scratch on its detection loss: a teacher, or a plain baseline.

    Args:
        config: the settings; those of the distillation are ignored.
        data: a COCO data folder, or opened data.
        out: becomes a model folder.
        options: fields of :class:`RunOptions`.

    Raises:
        InputError: the configuration, the data or the folder cannot be used.
        TrainingInterrupted: Ctrl-C; a checkpoint is left in ``out``.
    """
    return _Run(config, None, out, RunOptions(**options)).execute(data)


def distill_detector(
    config: TrainingConfig,
    teacher: str | os.PathLike,
    data: TrainingData | str | os.PathLike,
    out: str | os.PathLike,
    **options: Any,
) -> TrainingRun:
    """Train a student by eq. 3 of Rubin et al. 2021; with ``config.alpha`` 0, their baseline.

    The student starts from the teacher's backbone unless ``config.teacher_backbone`` is false, and
    uses its image processor.

    Args:
        config: the settings of the student.
        teacher: the model folder of the teacher.
        data: a COCO data folder, or opened data.
        out: becomes the student's model folder.
        options: fields of :class:`RunOptions`.

    Raises:
        InputError: the configuration, the teacher, the data or the folder cannot be used.
        TrainingInterrupted: Ctrl-C; a checkpoint is left in ``out``.
    """
    return _Run(config, Path(teacher), out, RunOptions(**options)).execute(data)


class _Run:
    """One training, from an empty or interrupted folder to a finished one."""

    def __init__(
        self,
        config: TrainingConfig,
        teacher_folder: Path | None,
        out: str | os.PathLike,
        options: RunOptions,
    ) -> None:
        self.config = config
        self.options = options
        self.folder = RunFolder(Path(out))
        self.teacher = self.teacher_processor = identity = None
        if teacher_folder is not None:
            self.teacher, self.teacher_processor = load_detector(teacher_folder)
            identity = TeacherIdentity.of(teacher_folder)
        self.record = RunRecord(config, identity)

    def execute(self, data: TrainingData | str | os.PathLike) -> TrainingRun:
        """Train, unless that is done already, and load the result."""
        started = time.perf_counter()
        if not isinstance(data, TrainingData):
            data = TrainingData.open(data)
        checkpoint = self._open_folder()
        if not self.folder.is_finished:
            self._train(data, checkpoint)
        model, processor = load_detector(self.folder.path)
        history = read_json(self.folder.path / HISTORY_FILE, list)
        seconds = time.perf_counter() - started
        return TrainingRun(self.folder.path, self.config, model, processor, history, seconds)

    def _open_folder(self) -> Path | None:
        """The checkpoint to go on from, if any."""
        if self.options.resume:
            return self.folder.resume(self.record)
        arguments = self._arguments()
        with arguments.main_process_first(desc="opening the folder"):
            if arguments.process_index == 0:
                self.folder.begin(self.record, overwrite=self.options.overwrite)
        return None

    def _train(self, data: TrainingData, checkpoint: Path | None) -> None:
        """From the untrained model, or a checkpoint, to the saved model."""
        config = self.config
        set_seed(config.seed)
        model, processor = self._build(data)
        models = [model] if self.teacher is None else [model, self.teacher]
        with contextlib.ExitStack() as stack:
            if config.amp == "bf16-backbone":
                stack.enter_context(bf16_backbone(*models))
            if checkpoint is not None:
                # The trainer does that too, but after the features have been cached.
                model.load_state_dict(load_detector(checkpoint)[0].state_dict())
            elif config.pretrain_backbone_steps and not self._starts_from_teacher:
                self._pretrain(model, image_source(data.train, processor, config))
            if config.freeze_backbone:
                freeze_backbone(model)
            trainer = self._trainer(model, processor, data)
            if config.cache_features or self._shares_backbone:
                stack.enter_context(feature_maps_as_input(*models))
            trainer.add_callback(stack.enter_context(StopOnInterrupt()))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.is_world_process_zero():
            save_detector(model, processor, self.folder.path)
            self.folder.finish()
        trainer.accelerator.wait_for_everyone()

    @property
    def _starts_from_teacher(self) -> bool:
        return self.teacher is not None and self.config.teacher_backbone

    @property
    def _shares_backbone(self) -> bool:
        return self._starts_from_teacher and self.config.freeze_backbone

    def _build(self, data: TrainingData) -> tuple[DetrForObjectDetection, BaseImageProcessor]:
        """The model as training finds it, and the processor of its images: the teacher's if any."""
        config = self.config
        overrides: dict[str, Any] = {"auxiliary_loss": config.auxiliary_loss}
        if config.dropout is not None:
            overrides["dropout"] = config.dropout
        model = build_detr(
            config.preset,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            num_queries=self._num_queries(data),
            num_labels=len(data.train.categories),
            id2label=dict(enumerate(data.train.categories)),
            **overrides,
        )
        if self._starts_from_teacher:
            load_backbone_weights(model, self.teacher)
        elif config.freeze_backbone and not config.pretrain_backbone_steps:
            raise InputError(
                "freeze_backbone is True but nothing has trained the backbone; "
                "expected pretrain_backbone_steps above 0, or a teacher's backbone"
            )
        if self.teacher_processor is not None:
            return model, self.teacher_processor
        size = None
        if config.image_size is not None:
            size = dict.fromkeys(get_preset(config.preset).image_size, config.image_size)
        return model, build_image_processor(config.preset, image_size=size)

    def _num_queries(self, data: TrainingData) -> int | None:
        """As configured; else the teacher's; else what the data needs; else the preset's.

        For one object an image there is one query (Rubin et al. 2021): with nothing to compete for
        it converges several times faster. For more, DETR wants clearly more queries than objects.
        """
        if self.config.num_queries is not None:
            return self.config.num_queries
        if self.teacher is not None:
            return self.teacher.config.num_queries
        if is_stream(data.train):
            return None
        most = most_objects(data.train)
        return 1 if most <= 1 else 2 * most

    def _pretrain(self, model: DetrForObjectDetection, source: Source) -> None:
        """Dense objectness: trains the backbone of ``model`` in place."""
        trainer = DistillationTrainer(
            model=DenseObjectness(model),
            args=self._arguments(
                max_steps=self.config.pretrain_backbone_steps,
                learning_rate=self.config.pretrain_learning_rate,
                max_grad_norm=1.0,
                save_strategy="no",
                eval_strategy="no",
            ),
            train_dataset=source.dataset,
            data_collator=source.collate,
            callbacks=self._callbacks(source, "backbone"),
        )
        trainer.train()

    def _trainer(
        self, model: DetrForObjectDetection, processor: BaseImageProcessor, data: TrainingData
    ) -> DistillationTrainer:
        config = self.config
        evaluate = None
        if config.eval_steps is not None and data.val is not None:
            evaluate = partial(detection_metrics, processor=processor, dataset=data.val)
        arguments = self._arguments(**({} if evaluate else {"eval_strategy": "no"}))
        source = self._source(model, processor, data, arguments)
        return DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=source.dataset,
            eval_dataset=data.val,
            data_collator=source.collate,
            processing_class=processor,
            callbacks=[
                *self._callbacks(source, "training"),
                HistoryWriter(self.folder.path / HISTORY_FILE),
                *([TensorBoard(self.folder.path / "tensorboard")] if config.tensorboard else []),
            ],
            teacher=self.teacher,
            alpha=config.alpha,
            temperature=config.temperature,
            class_weight=config.class_weight,
            share_backbone=self._shares_backbone and not config.cache_features,
            backbone_learning_rate=config.backbone_learning_rate,
            evaluate_detector=evaluate,
            record=self.record.to_dict(),
        )

    def _source(
        self,
        model: DetrForObjectDetection,
        processor: BaseImageProcessor,
        data: TrainingData,
        arguments: TrainingArguments,
    ) -> Source:
        if not self.config.cache_features:
            return image_source(data.train, processor, self.config)
        with arguments.main_process_first(desc="caching features"):
            return feature_source(
                model,
                data.train,
                processor,
                self.config,
                teacher=self.teacher,
                folder=self.options.feature_folder,
                device=arguments.device,
                progress=self._bar("features"),
            )

    def _arguments(self, **changes: Any) -> TrainingArguments:
        return training_arguments(
            self.config, self.folder.checkpoints, self.options.device, **changes
        )

    def _callbacks(self, source: Source, stage: str) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = []
        if hasattr(source.dataset, "set_epoch"):
            callbacks.append(EpochAnnouncer(source.dataset))
        if self.options.progress:
            callbacks.append(ProgressBar(self._title(stage)))
        return callbacks

    def _bar(self, stage: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        if not self.options.progress:
            return iter
        return lambda items: tqdm(items, desc=self._title(stage), file=sys.stderr, leave=False)

    def _title(self, stage: str) -> str:
        return f"{self.options.title} {stage}".strip()
