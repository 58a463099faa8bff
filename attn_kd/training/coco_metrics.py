"""Average precision as COCO defines it, over boxes held in memory.

faster-coco-eval does the matching: its results equal pycocotools' (a test compares them), in C++,
and it reports through :mod:`logging` where pycocotools prints tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MAX_DETECTIONS = 100  # per image, COCO's third limit: AP is defined at it


@dataclass(frozen=True)
class LabelledBoxes:
    """The objects of one image: what is there, or what a detector found.

    Attributes:
        boxes: ``[n, 4]`` x0, y0, x1, y1 in pixels.
        labels: ``[n]`` class indices.
        scores: ``[n]`` confidences of a detector; ``None`` for ground truth.
        crowd: ``[n]`` bool, ground truth that marks a region of many objects; ``None``: none does.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class AveragePrecision:
    """Means over the classes that occur; ``nan`` where the ground truth holds no object.

    Attributes:
        mean: averaged over the IoU thresholds 0.50, 0.55 … 0.95 (COCO's AP).
        at_50: at an IoU of 0.50.
        at_75: at an IoU of 0.75.
    """

    mean: float
    at_50: float
    at_75: float


def average_precision(
    truth: Sequence[LabelledBoxes], detections: Sequence[LabelledBoxes], num_classes: int
) -> AveragePrecision:
    """COCO's box AP of ``detections`` (with scores) against ``truth``, image by image.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(truth) != len(detections):
        raise ValueError(f"{len(truth)} images of ground truth, {len(detections)} of detections")
    if not any(len(image) for image in truth):
        return AveragePrecision(math.nan, math.nan, math.nan)
    from faster_coco_eval import COCO, COCOeval_faster

    annotated = COCO(_coco_dictionary(truth, num_classes))
    # min_score is left at 0: low scores cost nothing in AP, and DETR has few queries.
    found = annotated.loadRes(list(_coco_results(detections)))
    evaluation = COCOeval_faster(annotated, found, "bbox")
    evaluation.params.maxDets = [1, 10, _MAX_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]; all areas
    thresholds = np.asarray(evaluation.params.iouThrs)
    return AveragePrecision(
        mean=_mean_of_defined(precision),
        at_50=_mean_of_defined(precision[np.isclose(thresholds, 0.50)]),
        at_75=_mean_of_defined(precision[np.isclose(thresholds, 0.75)]),
    )


def _mean_of_defined(precision: np.ndarray) -> float:
    """COCO marks classes without ground truth by -1."""
    return float(precision[precision > -1].mean())


def _coco_dictionary(truth: Sequence[LabelledBoxes], num_classes: int) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(truth, start=1):
        crowd = np.zeros(len(image), bool) if image.crowd is None else image.crowd
        for box, label, is_crowd in zip(image.boxes, image.labels, crowd, strict=True):
            x, y, width, height = _corner_and_size(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCO's matcher takes 0 for "no match"
                    "image_id": image_id,
                    "category_id": int(label) + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(is_crowd),
                }
            )
    return {
        "images": [{"id": image_id} for image_id in range(1, len(truth) + 1)],
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": str(label)} for label in range(num_classes)],
    }


def _coco_results(detections: Sequence[LabelledBoxes]) -> Iterable[dict[str, Any]]:
    for image_id, image in enumerate(detections, start=1):
        if image.scores is None:
            raise ValueError("detections need scores")
        for box, label, score in zip(image.boxes, image.labels, image.scores, strict=True):
            yield {
                "image_id": image_id,
                "category_id": int(label) + 1,
                "bbox": _corner_and_size(box),
                "score": float(score),
            }


def _corner_and_size(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(value) for value in box)
    return [x0, y0, x1 - x0, y1 - y0]
