"""The student in use: a whole DETR-1/1 by transformers, with three attention implementations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DetrForObjectDetection

from bench.accuracy import Errors
from bench.detr import SETTINGS, build_student, make_batch
from bench.rounds import measure_in_turn

pytestmark = pytest.mark.cpu_only  # students are made for machines without a GPU
IMPLEMENTATIONS = ("sdpa", "attn_kd", "eager")
TOLERANCE = 1e-4  # relative; float32 sums over the pixels of a whole backbone


@torch.inference_mode()
def detect(student: DetrForObjectDetection, images: Tensor) -> Tensor:
    """Class scores and boxes of every image [batch, queries, labels + 1 + 4]."""
    outputs = student(pixel_values=images)
    return torch.cat([outputs.logits, outputs.pred_boxes], dim=-1)


@pytest.mark.parametrize("setting_name", SETTINGS)
def test_inference(benchmark: BenchmarkFixture, budget: float, setting_name: str) -> None:
    """One image at a time: the latency, and its inverse, of a stream of frames."""
    setting = SETTINGS[setting_name]._replace(batch=1)
    images = make_batch(setting)["pixel_values"]
    students = {name: build_student(setting, name) for name in IMPLEMENTATIONS}
    exact = detect(build_student(setting, "eager", torch.float64), images.double())
    errors = Errors()

    def check(name: str, found: Tensor) -> None:
        error = ((found.double() - exact).norm() / exact.norm()).item()
        assert error <= TOLERANCE, f"{name} is {error:.1e} off"
        errors[name] = {"output": error}

    benchmark.extra_info.update(
        {"kind": "inference", "shape": setting_name, "pass": "inference", "dtype": "float32"},
        sizes=setting._asdict(),
        errors=errors,
    )
    functions = {name: partial(detect, student, images) for name, student in students.items()}
    measure_in_turn(benchmark, functions, budget=budget / 2, verify=check)
