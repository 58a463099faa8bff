"""What a report is made of: the runs that are compared, how they were measured, and where."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attn_kd
from attn_kd.report.memory import AttentionMemory

ROLES = ("teacher", "baseline", "student")


@dataclass(frozen=True)
class Run:
    """A trained detector and what was measured of it."""

    role: str  # one of ROLES; "student" is the distilled one
    name: str  # as shown, e.g. "Teacher 6/6"
    folder: Path  # a model folder
    metrics: Mapping[str, Any]  # of attn_kd.training.evaluate_detector
    history: Sequence[Mapping[str, Any]]  # of training: step, detection_loss, attention_kl, ...
    attention_kl: float | None = None  # from the teacher, over the evaluated frames; nats
    seconds: float | None = None  # of training


@dataclass(frozen=True)
class Results:
    """Teacher, baseline and distilled student, in this order, and what surrounds them."""

    runs: Sequence[Run]
    evaluated_on: str  # e.g. "200 simulated clips of unseen seeds"
    memory: AttentionMemory | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quick: bool = False  # trained too briefly for its figures to mean anything

    def run(self, role: str) -> Run:
        """The run of a role."""
        return next(run for run in self.runs if run.role == role)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for ``report.json``."""
        return {
            "runs": [{**dataclasses.asdict(run), "folder": str(run.folder)} for run in self.runs],
            "evaluated_on": self.evaluated_on,
            "attention_memory": self.memory and dataclasses.asdict(self.memory),
            "settings": dict(self.settings),
            "quick": self.quick,
            "machine": describe_machine(),
        }


def describe_machine() -> dict[str, str]:
    """Versions, processor and threads: what figures depend on."""
    return {
        "attn_kd": attn_kd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor_name(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
