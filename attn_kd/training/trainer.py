"""The training loop: transformers' Trainer with the distillation loss and COCO evaluation.

From :class:`transformers.Trainer` come distributed training (accelerate, torchrun), mixed
precision, gradient clipping, learning rate schedules, TensorBoard and resuming. Added here: the
loss of Rubin et al. 2021 (eq. 3) with its parts logged apart, a learning rate of the backbone's
own, and checkpoints that appear whole or not at all and record which teacher they belong to.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from attn_kd.distill import AttentionDistiller, distillation_loss
from attn_kd.errors import InputError
from attn_kd.models import load_detector
from attn_kd.models.checkpoint import quiet_transformers
from attn_kd.training.config import read_json
from attn_kd.training.teacher_cache_batches import teacher_pass
from attn_kd.training.teacher_cache_format import CachedLayer

#: The file in every checkpoint that says which run, and which teacher, it belongs to.
RECORD_NAME = "attn_kd.json"


class DistillationTrainer(Trainer):
    """Trains a detector on its detection loss and, with a teacher, on the teacher's attention.

    With ``alpha=0`` the student learns from the detection loss alone, and its divergence from the
    teacher is measured all the same: the baseline of Rubin et al. 2021, Fig. 4.

    The teacher is no part of the trained model: it is neither optimised nor saved.

    Args:
        teacher: the trained detector to distil from; ``None`` trains a plain detector.
        cached_layers: batches hold what the teacher has made of their images, of these layers, and
            it is not run; it may be one without weights.
        distiller_options: which layers, heads and grids are compared, and how: keyword arguments of
            :class:`~attn_kd.AttentionDistiller`.
        alpha: weight of the attention divergence; the detection loss has weight ``1 - alpha``.
        temperature: of the optional class term.
        class_weight: weight of the class term beside the attention divergence.
        share_backbone: teacher and student have the same frozen backbone; it is run once for both.
            To be used inside :func:`~attn_kd.training.backbone_forward.feature_maps_as_input`.
        backbone_learning_rate: ``None`` for that of the arguments.
        evaluate_detector: called with the model by :meth:`evaluate`; returns the metrics.
        record: JSON values written into every checkpoint as ``attn_kd.json``.
        **trainer_arguments: those of :class:`transformers.Trainer`.
    """

    optimizer: torch.optim.Optimizer  # None before create_optimizer
    control: TrainerControl

    def __init__(
        self,
        *,
        teacher: nn.Module | None = None,
        cached_layers: Sequence[CachedLayer] | None = None,
        distiller_options: Mapping[str, Any] | None = None,
        alpha: float = 0.7,
        temperature: float = 1.0,
        class_weight: float = 0.0,
        share_backbone: bool = False,
        backbone_learning_rate: float | None = None,
        evaluate_detector: Callable[[nn.Module], dict[str, float]] | None = None,
        record: Mapping[str, Any] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(**trainer_arguments)
        # Progress is the caller's business; these two print.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The loss is a mean over the batch; DETR takes no count of items to divide by instead.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher
        self.cached_layers = cached_layers
        if teacher is not None and cached_layers is None:
            self.teacher = teacher.to(self.args.device).eval()
        self.distiller_options = dict(distiller_options or {})
        self.loss_weights = {
            "alpha": alpha,
            "temperature": temperature,
            "class_weight": class_weight,
        }
        self.share_backbone = share_backbone
        self.backbone_learning_rate = backbone_learning_rate
        self.evaluate_detector = evaluate_detector
        self.record = dict(record or {})
        self._distiller: AttentionDistiller | None = None
        self._parts = _Means()
        self._staging: Path | None = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As :meth:`transformers.Trainer.train`; both models are left as they were, but trained."""
        with contextlib.ExitStack() as stack:
            # Its bars and warnings of settings that may well differ break up the progress bar.
            stack.enter_context(quiet_transformers())
            if self.teacher is not None:
                self._distiller = stack.enter_context(
                    AttentionDistiller(self.teacher, self.model, **self.distiller_options)
                )
            return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Eq. 3 of Rubin et al. 2021; the detection loss alone where there is no teacher."""
        if self._distiller is None:
            outputs = model(**inputs)
            loss = outputs.loss
            self._parts.add(detection_loss=loss)
        else:
            if self.share_backbone:
                inputs = self._through_backbone(inputs)
            given = None
            if self.cached_layers is not None:
                inputs, given = teacher_pass(inputs, self.cached_layers)
            result = self._distiller.run(inputs, student=model, teacher_pass=given)
            outputs = result.student
            parts = distillation_loss(result, **self.loss_weights)
            loss = parts.total
            self._parts.add(detection_loss=parts.detection, attention_kl=parts.attention_kl)
            if self.loss_weights["class_weight"] > 0:
                self._parts.add(class_kl=parts.class_kl)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _through_backbone(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with feature maps in the place of images."""
        with self.accelerator.autocast():
            maps = self.model.model.backbone(inputs["pixel_values"], inputs["pixel_mask"])
        features, mask = maps[-1]
        return {**inputs, "pixel_values": features.float(), "pixel_mask": mask}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, averaged since the last entry, to an entry about training.

        Raises:
            InputError: the loss is no longer finite.
        """
        if "loss" in logs:
            logs |= self._parts.take(self.accelerator.gather)
            if not math.isfinite(logs["loss"]):
                raise self._diverged()
        super().log(logs, start_time)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in the base class.

        Raises:
            InputError: what the model predicts is no longer finite.
        """
        try:
            return super().training_step(model, *args, **kwargs)
        except ValueError as error:
            # DETR's loss refuses boxes that are not numbers by the corners it finds in no order.
            if "[x0, y0, x1, y1]" not in str(error):
                raise
            raise self._diverged() from error

    def require_finite_weights(self) -> None:
        """Check the weights, buffers included, of the model as it is now.

        Raises:
            InputError: one is not finite.
        """
        state = self.accelerator.unwrap_model(self.model).state_dict()
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise self._diverged()

    def _diverged(self) -> InputError:
        return InputError(
            f"the training diverged by step {max(1, self.state.global_step)}; "
            f"expected a learning_rate below {self.args.learning_rate:g}"
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate is for models of tokens."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the backbone's own learning rate; norms and biases are not decayed."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(self._parameter_groups(model), **options)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                in_backbone = "backbone" in name.split(".")
                groups.setdefault((in_backbone, name in decayed), []).append(parameter)
        backbone_rate = self.backbone_learning_rate
        if backbone_rate is None:
            backbone_rate = self.args.learning_rate
        return [
            {
                "params": parameters,
                "lr": backbone_rate if in_backbone else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if is_decayed else 0.0,
            }
            for (in_backbone, is_decayed), parameters in groups.items()
        ]

    def _get_learning_rate(self) -> float:
        """The highest of the groups; transformers logs the first, which is the backbone's."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Log and return what ``evaluate_detector`` measures, keys prefixed."""
        if self.evaluate_detector is None:
            raise ValueError("evaluate() needs evaluate_detector, given when the trainer was made")
        measured = self.evaluate_detector(self.accelerator.unwrap_model(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save beside, then rename: a save cut short leaves the checkpoint before it as it was.

        Raises:
            InputError: the weights are no longer finite; the checkpoint before is left.
        """
        self.require_finite_weights()
        run_folder = Path(self.args.output_dir)
        final = run_folder / f"checkpoint-{self.state.global_step}"
        self._staging = run_folder / ".saving"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process has added its random state
        if self.args.should_save:
            saved = self._staging / final.name
            (saved / RECORD_NAME).write_text(json.dumps(self.record, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            saved.rename(final)
            self._staging.rmdir()
            rotate_checkpoints(str(run_folder), self.args.save_total_limit)
        self._staging = None

    def load_weights(self, checkpoint: str | os.PathLike) -> None:
        """Load the weights of a checkpoint into the model.

        ``save_pretrained`` gives DETR's tensors the names of the original DETR. ``from_pretrained``
        takes them back; resuming in transformers 5.23 does not, and leaves those tensors as they
        are with a warning. Of a model that is none of transformers', the tensors are as they are.

        Raises:
            InputError: a file is missing or broken.
        """
        if isinstance(self.model, PreTrainedModel):
            state = load_detector(checkpoint)[0].state_dict()
        else:
            with _broken_files_named(checkpoint, SAFE_WEIGHTS_NAME):
                state = load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME)
        self.model.load_state_dict(state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """As :meth:`load_weights`."""
        self.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in the base class, which takes a missing file for nothing to load.

        Raises:
            InputError: a file is missing or broken.
        """
        if checkpoint is not None:
            for name in ("optimizer.pt", "scheduler.pt"):
                if not (Path(checkpoint) / name).is_file():
                    raise InputError(f"cannot resume from {checkpoint}: it has no {name}")
        with _broken_files_named(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in the base class.

        Raises:
            InputError: the file is broken.
        """
        with _broken_files_named(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)


def checkpoint_state(checkpoint: Path) -> TrainerState:
    """How far a checkpoint has come, and what was logged until then.

    Raises:
        InputError: the file is missing or broken.
    """
    path = checkpoint / TRAINER_STATE_NAME
    read_json(path, dict)
    with _broken_files_named(checkpoint, path.name):
        return TrainerState.load_from_json(str(path))


def is_last(checkpoint: Path) -> bool:
    """Whether a training has no step left after a checkpoint; resumed, it would do one too many.

    Raises:
        InputError: the file is missing or broken.
    """
    state = checkpoint_state(checkpoint)
    return state.global_step >= state.max_steps


@contextlib.contextmanager
def _broken_files_named(checkpoint: str | os.PathLike | None, files: str) -> Iterator[None]:
    """Turn what reading damaged files raises into one clear error."""
    try:
        yield
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        OSError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"cannot resume from {checkpoint}: {files} is broken ({type(error).__name__})"
        ) from error


class _Means:
    """Means of scalars between two log entries, summed on their device without waiting for it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means over all processes; starts anew."""
        means = {
            name: gather(total / self._counts[name]).mean().item()
            for name, total in self._sums.items()
        }
        self._sums, self._counts = {}, {}
        return means
