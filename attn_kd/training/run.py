"""Whole trainings: from a configuration and a data folder to a model folder."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import wait_for_everyone
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed

from attn_kd.errors import InputError
from attn_kd.models import freeze_backbone, load_detector, save_detector
from attn_kd.training.arguments import training_arguments
from attn_kd.training.backbone_forward import bf16_backbone, feature_maps_as_input
from attn_kd.training.callbacks import (
    EpochAnnouncer,
    HistoryWriter,
    ProgressBar,
    StopOnInterrupt,
    TensorBoard,
    TrainingInterrupted,
    begun_again,
    require_tensorboard,
)
from attn_kd.training.config import TrainingConfig, read_json
from attn_kd.training.datasets import data_fingerprint
from attn_kd.training.evaluation import detection_metrics
from attn_kd.training.pretrain import pretrain_backbone
from attn_kd.training.records import (
    HISTORY_FILE,
    TENSORBOARD,
    RunFolder,
    RunRecord,
    history_entries,
    write_json,
)
from attn_kd.training.sources import Source, TrainingData, feature_source, image_source
from attn_kd.training.teacher import Teacher, distilled_layers
from attn_kd.training.trainer import DistillationTrainer, checkpoint_state, is_last
from attn_kd.training.untrained import rehearse, untrained_detector

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
        teacher_cache: what the teacher makes of the images is read from there, and it is not run.
        progress: show bars on stderr.
        title: names the run in the bars.
    """

    resume: bool = False
    overwrite: bool = False
    device: torch.device | str | None = None
    feature_folder: Path | None = None
    teacher_cache: Path | None = None
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
        TrainingInterrupted: Ctrl-C; what ``out`` then holds can be resumed.
    """
    return _Run(config, None, data, out, RunOptions(**options)).execute()


def distill_detector(
    config: TrainingConfig,
    teacher: str | os.PathLike | None,
    data: TrainingData | str | os.PathLike,
    out: str | os.PathLike,
    **options: Any,
) -> TrainingRun:
    """Train a student by eq. 3 of Rubin et al. 2021; with ``config.alpha`` 0, their baseline.

    The student starts from the teacher's backbone unless ``config.teacher_backbone`` is false, and
    uses its image processor.

    Args:
        config: the settings of the student.
        teacher: the model folder of the teacher; with a ``teacher_cache`` it may be ``None``.
        data: a COCO data folder, or opened data.
        out: becomes the student's model folder.
        options: fields of :class:`RunOptions`.

    Raises:
        InputError: the configuration, the teacher, the data or the folder cannot be used.
        TrainingInterrupted: Ctrl-C; what ``out`` then holds can be resumed.
    """
    how = RunOptions(**options)
    if how.teacher_cache is not None:
        taught_by = Teacher.cached(how.teacher_cache, teacher)
    elif teacher is not None:
        taught_by = Teacher.load(teacher)
    else:
        raise InputError("teacher is None and so is teacher_cache; expected one of them")
    return _Run(config, taught_by, data, out, how).execute()


class _Run:
    """One training, from an empty or interrupted folder to a finished one."""

    def __init__(
        self,
        config: TrainingConfig,
        teacher: Teacher | None,
        data: TrainingData | str | os.PathLike,
        out: str | os.PathLike,
        options: RunOptions,
    ) -> None:
        self.config = config
        self.options = options
        self.folder = RunFolder(Path(out))
        self.data = data if isinstance(data, TrainingData) else TrainingData.open(data)
        self.teacher = teacher
        self.cache = None if teacher is None else teacher.cache
        self.views = None if teacher is None else teacher.views(augment=config.augment)
        if self.cache is not None:
            self.cache.require_amp(config.amp)
        self.record = RunRecord(
            config,
            None if teacher is None else teacher.identity,
            data_fingerprint(self.data.train),
            None if self.cache is None else self.cache.identity,
        )

    def execute(self) -> TrainingRun:
        """Train, unless that is done already, and load the result."""
        started = time.perf_counter()
        if self.options.resume:
            checkpoint = self.folder.resume(self.record)
            if not self.folder.is_finished:
                self._go_on(checkpoint)
        else:
            self._start()
        model, processor = load_detector(self.folder.path)
        history = read_json(self.folder.path / HISTORY_FILE, list)
        seconds = time.perf_counter() - started
        return TrainingRun(self.folder.path, self.config, model, processor, history, seconds)

    def _start(self) -> None:
        """Train from the first step; where that cannot even begin, the folder stays as it was."""
        arguments = self._arguments()
        is_main = arguments.process_index == 0
        if is_main:
            self.folder.require_free(overwrite=self.options.overwrite)
        model, processor = self._prepare()
        with arguments.main_process_first(desc="opening the folder"):
            if is_main:
                self.folder.begin(self.record, overwrite=self.options.overwrite)
        try:
            self._train(model, processor, None)
        except Exception:
            if is_main and not self.folder.has_progress:
                self.folder.withdraw()
            raise

    def _go_on(self, checkpoint: Path | None) -> None:
        """Train on from a checkpoint, or from the first step where there is none."""
        if checkpoint is None or not is_last(checkpoint):
            self._train(*self._prepare(), checkpoint)
            return
        history = history_entries(checkpoint_state(checkpoint).log_history)
        arguments = self._arguments()
        wait_for_everyone()  # each process has found the checkpoint before the first deletes it
        with arguments.main_process_first(desc="saving the model"):
            if arguments.process_index == 0:
                write_json(self.folder.path / HISTORY_FILE, history)
                save_detector(*load_detector(checkpoint), self.folder.path)
                self.folder.finish()

    def _prepare(self) -> tuple[DetrForObjectDetection, BaseImageProcessor]:
        """The untrained model and its processor, after all has been checked that can be by now."""
        config = self.config
        if config.tensorboard:
            require_tensorboard()
        if config.eval_steps is not None and self.data.val is None:
            warnings.warn(
                f"eval_steps is {config.eval_steps} but the data has no validation split; "
                "nothing is measured during training",
                stacklevel=2,
            )
        set_seed(config.seed)
        model, processor = untrained_detector(config, self.data.train, self.teacher)
        rehearse(config, model, processor, self.data.train, self.teacher)
        self._verify_cache()  # reads every shard and image, so last
        return model, processor

    def _train(
        self,
        model: DetrForObjectDetection,
        processor: BaseImageProcessor,
        checkpoint: Path | None,
    ) -> None:
        """From the untrained model, or a checkpoint, to the saved model."""
        config = self.config
        models = [model] if self._running_teacher is None else [model, self._running_teacher]
        interrupt = StopOnInterrupt()
        with contextlib.ExitStack() as stack:
            if config.amp == "bf16-backbone":
                stack.enter_context(bf16_backbone(*models))
            trained = checkpoint
            if checkpoint is None and self.folder.has_pretrained:
                trained = self.folder.pretrained
            if trained is not None:
                # The trainer does that too, but after the features have been cached.
                model.load_state_dict(load_detector(trained)[0].state_dict())
            elif config.pretrain_backbone_steps and not self._starts_from_teacher:
                self._pretrain(model, processor)
            if config.freeze_backbone:
                freeze_backbone(model)
            with begun_again("the caching of features"):
                trainer = self._trainer(model, processor)
            if config.cache_features or self._shares_backbone:
                stack.enter_context(feature_maps_as_input(*models))
            trainer.add_callback(stack.enter_context(interrupt))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.is_world_process_zero():
            save_detector(model, processor, self.folder.path)
            self.folder.finish()
        trainer.accelerator.wait_for_everyone()
        if interrupt.requested:
            raise TrainingInterrupted("the training had come to its end; the model is saved")

    @property
    def _starts_from_teacher(self) -> bool:
        return self.teacher is not None and self.config.teacher_backbone

    @property
    def _shares_backbone(self) -> bool:
        """Whether one backbone, frozen, runs for teacher and student."""
        runs_teacher = self._running_teacher is not None
        return runs_teacher and self._starts_from_teacher and self.config.freeze_backbone

    @property
    def _running_teacher(self) -> DetrForObjectDetection | None:
        """The teacher that runs beside the student; none does with a cache."""
        return None if self.teacher is None or self.cache is not None else self.teacher.model

    def _pretrain(self, model: DetrForObjectDetection, processor: BaseImageProcessor) -> None:
        """Train the backbone of ``model`` in place, and keep the result."""
        source = image_source(self.data.train, processor, self.config)
        arguments = self._arguments(
            output_dir=str(self.folder.pretraining),
            max_steps=self.config.pretrain_backbone_steps,
            learning_rate=self.config.pretrain_learning_rate,
            max_grad_norm=1.0,
            eval_strategy="no",
        )
        callbacks = self._callbacks(source, "backbone")
        keep = partial(save_detector, model, processor, self.folder.pretrained)
        pretrain_backbone(model, source, arguments, callbacks, keep)

    def _trainer(
        self, model: DetrForObjectDetection, processor: BaseImageProcessor
    ) -> DistillationTrainer:
        config, data = self.config, self.data
        evaluate = None
        if config.eval_steps is not None and data.val is not None:
            evaluate = partial(detection_metrics, processor=processor, dataset=data.val)
        arguments = self._arguments(**({} if evaluate else {"eval_strategy": "no"}))
        source = self._source(model, processor, arguments)
        if self.teacher is not None:
            layers = distilled_layers(model, self.teacher.model, config)
            source = self.teacher.taught(source, data.train, layers.values())
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
                *([TensorBoard(self.folder.path / TENSORBOARD)] if config.tensorboard else []),
            ],
            teacher=None if self.teacher is None else self.teacher.model,
            distiller_options=config.distiller_options,
            alpha=config.alpha,
            temperature=config.temperature,
            class_weight=config.class_weight,
            cached_layers=None if self.cache is None else self.cache.recipe.layers,
            share_backbone=self._shares_backbone and not config.cache_features,
            backbone_learning_rate=config.backbone_learning_rate,
            evaluate_detector=evaluate,
            record=self.record.to_dict(),
        )

    def _source(
        self,
        model: DetrForObjectDetection,
        processor: BaseImageProcessor,
        arguments: TrainingArguments,
    ) -> Source:
        if not self.config.cache_features:
            return image_source(self.data.train, processor, self.config, self.views)
        with arguments.main_process_first(desc="caching features"):
            return feature_source(
                model,
                self.data.train,
                processor,
                self.config,
                teacher=self._running_teacher,
                views=self.views,
                folder=self.options.feature_folder,
                device=arguments.device,
                progress=self._bar("features"),
            )

    def _verify_cache(self) -> None:
        """Check the teacher cache and the images it is of, once on every machine."""
        arguments = self._arguments()
        with arguments.main_process_first(desc="checking the teacher cache"):
            if self.cache is not None and arguments.local_process_index == 0:
                self.cache.verify(self.data.train, self._bar("teacher cache"))

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
