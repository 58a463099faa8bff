"""Training: configuration, trainer, feature and teacher caches, evaluation, and whole runs.

The configuration is imported at once; what needs transformers is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from attn_kd.training.config import TrainingConfig

_HOMES = {
    "CacheOptions": "teacher_cache_recorder",
    "DistillationTrainer": "trainer",
    "RunOptions": "run",
    "TrainingData": "sources",
    "TrainingInterrupted": "callbacks",
    "TrainingRun": "run",
    "TeacherCache": "teacher_cache",
    "attention_divergence": "evaluation",
    "cache_teacher": "teacher_cache_recorder",
    "detection_metrics": "evaluation",
    "distill_detector": "run",
    "evaluate_detector": "evaluation",
    "images_per_second": "evaluation",
    "train_detector": "run",
}

__all__ = ["TrainingConfig", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
