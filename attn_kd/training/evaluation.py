"""How good a detector is, how fast and how large."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from attn_kd.data import DetectionCollator
from attn_kd.distill import AttentionDistiller
from attn_kd.errors import InputError
from attn_kd.models import count_macs, count_parameters
from attn_kd.training.coco_metrics import LabelledBoxes, average_precision
from attn_kd.training.datasets import DetectionDataset

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection
    from transformers.image_processing_utils import BaseImageProcessor

_WARM_UP_PASSES = 5
_TIMED_PASSES = 30

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def evaluate_detector(
    model: DetrForObjectDetection,
    processor: BaseImageProcessor,
    dataset: DetectionDataset,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    progress: Progress = iter,
) -> dict[str, float]:
    """Everything that is measured of a detector on a split.

    Returns:
        The metrics of :func:`detection_metrics`, and ``images_per_second`` (see
        :func:`images_per_second`), ``parameters``, ``macs`` (multiply-accumulates of one image of
        the size of the split's first) and ``num_images``.

    Raises:
        InputError: the split is empty, or its classes are not the model's.
    """
    metrics = detection_metrics(
        model,
        processor,
        dataset,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
        progress=progress,
    )
    first = DetectionCollator(processor)([dataset[0]])
    return {
        **metrics,
        "images_per_second": images_per_second(model, first),
        "parameters": count_parameters(model),
        "macs": count_macs(model, tuple(first["pixel_values"].shape[-2:])),
        "num_images": len(dataset),
    }


def detection_metrics(
    model: DetrForObjectDetection,
    processor: BaseImageProcessor,
    dataset: DetectionDataset,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    progress: Progress = iter,
) -> dict[str, float]:
    """COCO's average precision over a split; the model's mode is restored, it stays on ``device``.

    Where the data marks short insertions (Rubin et al. 2021: the needle has just come into view)
    there is also their AP. It is taken over the images so marked and those without any object: the
    hard positives against all negatives, so that a detector that fires everywhere gains nothing.

    Args:
        dataset: the split, e.g. a :class:`~attn_kd.data.CocoDetection`.
        device: ``None`` for where the model is.

    Returns:
        ``mAP`` (IoU 0.50:0.95), ``mAP50``, ``mAP75`` and perhaps ``mAP50_short``; ``nan`` where no
        object is annotated.

    Raises:
        InputError: the split is empty, or its classes are not the model's.
    """
    _require_same_classes(model, dataset)
    model.to(model.device if device is None else device)
    truth, found, short = [], [], []
    for batch, indices, marks in progress(_batches(dataset, processor, batch_size, num_workers)):
        found += _detect(model, processor, batch)
        truth += [_annotated(dataset, index) for index in indices]
        short += marks
    overall = average_precision(truth, found, len(dataset.categories))
    metrics = {"mAP": overall.mean, "mAP50": overall.at_50, "mAP75": overall.at_75}
    if any(short):
        kept = [i for i, is_short in enumerate(short) if is_short or len(truth[i]) == 0]
        hard = average_precision(
            [truth[i] for i in kept], [found[i] for i in kept], len(dataset.categories)
        )
        metrics["mAP50_short"] = hard.at_50
    return metrics


def images_per_second(model: DetrForObjectDetection, batch: dict[str, Any]) -> float:
    """Speed of the model's forward pass on a batch: the median of some passes after warm-up.

    For a latency-bound figure the batch holds one image. Neither decoding nor resizing the image is
    in it, nor are the threads or the precision changed.
    """
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("pixel_values", "pixel_mask")}
    seconds = []
    with _evaluating(model):
        for number in range(_WARM_UP_PASSES + _TIMED_PASSES):
            started = time.perf_counter()
            model(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= _WARM_UP_PASSES:
                seconds.append(time.perf_counter() - started)
    return len(inputs["pixel_values"]) / statistics.median(seconds)


def attention_divergence(
    teacher: DetrForObjectDetection,
    student: DetrForObjectDetection,
    processor: BaseImageProcessor,
    dataset: DetectionDataset,
    *,
    layers: dict[str, str] | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    progress: Progress = iter,
) -> float:
    """Mean KL(student || teacher) of the distilled layers' attention over a split, without dropout.

    Images count alike, whatever their number of visible positions. None is padded: images of
    different sizes go through one by one, so the figure does not depend on the batches.
    """
    total = 0.0
    device = student.device if device is None else device
    distiller = AttentionDistiller(teacher.to(device), student.to(device), layers=layers)
    with distiller, _evaluating(student):
        for batch, _, _ in progress(_batches(dataset, processor, batch_size, num_workers)):
            for inputs in _without_padding(batch):
                on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
                total += distiller(**on_device).attention_kl.item() * len(inputs["pixel_mask"])
    return total / len(dataset)


def _without_padding(batch: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """The images of a batch: together where they fill it, else one by one."""
    pixels, mask = batch["pixel_values"], batch["pixel_mask"]
    if mask.all():
        yield {"pixel_values": pixels, "pixel_mask": mask}
        return
    for image, inside in zip(pixels, mask, strict=True):
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        yield {
            "pixel_values": image[None, :, :height, :width],
            "pixel_mask": inside[None, :height, :width],
        }


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; its modules' modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Numbered(Dataset):
    """Items with their index."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.dataset[index]


@dataclass(frozen=True)
class _Collate:
    """A batch, the indices of its items, and which are marked as short insertions."""

    collate: DetectionCollator

    def __call__(
        self, numbered: Sequence[tuple[int, dict[str, Any]]]
    ) -> tuple[dict[str, Any], list[int], list[bool]]:
        indices, items = zip(*numbered, strict=True)
        marks = [bool(item.get("short_insertion", False)) for item in items]
        return self.collate(items), list(indices), marks


def _batches(
    dataset: DetectionDataset, processor: BaseImageProcessor, batch_size: int, num_workers: int
) -> DataLoader:
    if len(dataset) == 0:
        raise InputError("the split to evaluate on is empty; expected at least one image")
    return DataLoader(
        _Numbered(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_Collate(DetectionCollator(processor)),
    )


def _detect(
    model: DetrForObjectDetection, processor: BaseImageProcessor, batch: dict[str, Any]
) -> list[LabelledBoxes]:
    """All that the model finds in a batch, however unsure, within the images."""
    device = next(model.parameters()).device
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    with _evaluating(model):
        outputs = model(
            pixel_values=batch["pixel_values"].to(device),
            pixel_mask=batch["pixel_mask"].to(device),
        )
        found = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=sizes.to(device)
        )
    return [
        LabelledBoxes(
            # [n, 4] in x0, y0, x1, y1 against width, height, width, height
            boxes=np.clip(one["boxes"].float().cpu().numpy(), 0, size.flip(0).repeat(2).numpy()),
            labels=one["labels"].cpu().numpy(),
            scores=one["scores"].float().cpu().numpy(),
        )
        for one, size in zip(found, sizes, strict=True)
    ]


def _annotated(dataset: DetectionDataset, index: int) -> LabelledBoxes:
    objects = dataset.annotations(index)
    return LabelledBoxes(
        objects.boxes.numpy(), objects.class_labels.numpy(), crowd=objects.iscrowd.numpy()
    )


def _require_same_classes(model: DetrForObjectDetection, dataset: DetectionDataset) -> None:
    known = [model.config.id2label[label] for label in range(model.config.num_labels)]
    if known != dataset.categories:
        raise InputError(
            f"the model detects {', '.join(known)}; the data has {', '.join(dataset.categories)}"
        )
