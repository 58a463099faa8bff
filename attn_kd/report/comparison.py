"""The main job: a teacher, a plain student and a distilled one, trained, measured and compared."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attn_kd.data import CocoDetection, DetectionCollator
from attn_kd.models import load_detector
from attn_kd.report.memory import AttentionMemory, measure_attention_memory
from attn_kd.report.results import ROLES, Run
from attn_kd.report.stages import Stages
from attn_kd.training import (
    TrainingConfig,
    attention_divergence,
    distill_detector,
    evaluate_detector,
    images_per_second,
    train_detector,
)

_SPEED_ROUNDS = 5


@dataclass(frozen=True)
class Comparison:
    """Which detectors are trained on which data, and where they are kept.

    The baseline is the distilled student with α = 0: same seed, same budget, same first weights.

    Args:
        teacher, student: how the two are trained.
        data: a COCO data folder with the splits ``train`` and ``test``.
        out: gets a model folder for each of the three.
    """

    teacher: TrainingConfig
    student: TrainingConfig
    data: Path
    out: Path
    device: torch.device
    progress: bool = False

    def config(self, role: str) -> TrainingConfig:
        """The training of a role."""
        if role == "teacher":
            return self.teacher
        return self.student if role == "student" else self.student.replace(alpha=0.0)

    def name(self, role: str) -> str:
        """How a role is shown, with its encoder and decoder layers."""
        config = self.config(role)
        title = {"teacher": "Teacher", "baseline": "Baseline", "student": "Distilled"}[role]
        return f"{title} {config.encoder_layers}/{config.decoder_layers}"

    def run(self, stages: Stages) -> list[Run]:
        """Train and measure all three, each in a stage.

        Raises:
            InputError: the data or a folder cannot be used.
            TrainingInterrupted: Ctrl-C; a checkpoint is left for the stage to go on from.
        """
        trained = {role: stages.run(role, partial(self._train, role)) for role in ROLES}
        measured = stages.run("evaluation", lambda _: self._measure())
        return [
            Run(role, self.name(role), self.out / role, **measured[role], **trained[role])
            for role in ROLES
        ]

    def _train(self, role: str, may_go_on: bool) -> dict[str, Any]:
        folder = self.out / role
        resume = may_go_on and (folder / "training.json").is_file()
        options: dict[str, Any] = {
            "resume": resume,
            "overwrite": not resume,
            "device": self.device,
            "progress": self.progress,
            "title": self.name(role),
        }
        if role == "teacher":
            run = train_detector(self.teacher, self.data, folder, **options)
        else:
            teacher = self.out / "teacher"
            run = distill_detector(self.config(role), teacher, self.data, folder, **options)
        return {"history": run.history}

    def _measure(self) -> dict[str, Any]:
        dataset = CocoDetection(self.data, "test")
        models, processors = {}, {}
        for role in ROLES:
            models[role], processors[role] = load_detector(self.out / role)
        measured: dict[str, Any] = {}
        for role in ROLES:
            data = (processors[role], dataset)
            metrics = evaluate_detector(models[role], *data, device=self.device)
            divergence = None
            if role != "teacher":
                pair = models["teacher"], models[role]
                divergence = attention_divergence(*pair, *data, device=self.device)
            measured[role] = {"metrics": _json_numbers(metrics), "attention_kl": divergence}
        image = DetectionCollator(processors["teacher"])([dataset[0]])
        for role, speed in _compare_speeds(models, image).items():
            measured[role]["metrics"]["images_per_second"] = speed
        return measured


def _json_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON has them: None for nan, the precision where there is nothing to find."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _compare_speeds(models: Mapping[str, Any], image: dict[str, Any]) -> dict[str, float]:
    """Images per second of each model, one image at a time: the median of interleaved rounds.

    What else the machine does changes by the second; in turn, it hits all models alike.
    """
    speeds: dict[str, list[float]] = {role: [] for role in models}
    for _ in range(_SPEED_ROUNDS):
        for role, model in models.items():
            speeds[role].append(images_per_second(model, image))
    return {role: statistics.median(found) for role, found in speeds.items()}


def measure_memory(stages: Stages, tokens: int) -> AttentionMemory | None:
    """Measure the attention loss's peak memory, fused and eager, in a stage."""

    def measure(_: bool) -> dict[str, Any]:
        memory = measure_attention_memory(tokens=tokens)
        return {"memory": memory and dataclasses.asdict(memory)}

    measured = stages.run("memory", measure)["memory"]
    return measured and AttentionMemory(**measured)
