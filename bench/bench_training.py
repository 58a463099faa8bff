"""Whole training steps of a DETR: what distillation adds to them, in time and in memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

pytest.importorskip("transformers")

from bench.accuracy import Errors
from bench.detr import GPU_SETTINGS, SETTINGS, WAYS, Losses, Setting, TrainingStep, make_batch
from bench.devices import clock_for
from bench.peak_memory import STATUS, growth_on_gpu, peak_bytes_in_subprocess
from bench.rounds import measure_in_turn

# Relative, of sums over the pixels of a whole backbone.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
AUTOCAST = torch.bfloat16  # on a GPU


@pytest.mark.cpu_only
@pytest.mark.parametrize("setting_name", SETTINGS)
def test_training_step(benchmark: BenchmarkFixture, budget: float, setting_name: str) -> None:
    setting = SETTINGS[setting_name]
    batch, exact = make_batch(setting), ExactStep(setting)
    steps = {way: TrainingStep(way, setting) for way in WAYS}
    errors = Errors()
    benchmark.extra_info.update(
        {"kind": "training", "shape": setting_name, "pass": "training step", "dtype": "float32"},
        sizes=setting._asdict(),
        errors=errors,
    )
    measure_in_turn(
        benchmark,
        {way: partial(step, batch) for way, step in steps.items()},
        budget=budget,
        verify=lambda way, losses: errors.update({way: exact.check(steps[way], losses)}),
    )


MEMORY_SETTINGS = ["detr-tiny-416", "detr-tiny-800", "detr-r50-416", "detr-r50-800"]


@pytest.mark.gpu
@pytest.mark.parametrize("setting_name", GPU_SETTINGS)
def test_training_step_on_gpu(
    benchmark: BenchmarkFixture, budget: float, device: torch.device, setting_name: str
) -> None:
    """In bfloat16 by autocast; compared with float64 in a step with one image, whose maps fit."""
    setting, errors = GPU_SETTINGS[setting_name], Errors()
    check_in_autocast(setting._replace(batch=1), device, errors)
    steps = {way: TrainingStep(way, setting, device=device, autocast=AUTOCAST) for way in WAYS}
    batch = make_batch(setting, device=device)
    benchmark.extra_info.update(
        {"kind": "training", "shape": setting_name, "pass": "training step", "dtype": "bfloat16"},
        sizes=setting._asdict(),
        errors=errors,
    )
    functions = {way: partial(step, batch) for way, step in steps.items()}
    measure_in_turn(benchmark, functions, budget=budget, clock=clock_for(device))


@pytest.mark.gpu
@pytest.mark.parametrize("setting_name", GPU_SETTINGS)
def test_training_memory_on_gpu(
    benchmark: BenchmarkFixture, device: torch.device, setting_name: str
) -> None:
    setting = GPU_SETTINGS[setting_name]
    batch = make_batch(setting, device=device)
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}

    def measure_all() -> None:
        for way in WAYS:
            step = TrainingStep(way, setting, device=device, autocast=AUTOCAST)
            step(make_batch(setting, pixels=64, device=device))  # makes the optimizer's state
            peaks[way].append(growth_on_gpu(partial(step, batch)))

    benchmark.pedantic(measure_all, rounds=1)
    benchmark.extra_info.update(
        {"kind": "training memory", "shape": setting_name, "pass": "training step"},
        dtype="bfloat16",
        sizes=setting._asdict(),
        peak_bytes=peaks,
    )


def check_in_autocast(setting: Setting, device: torch.device | str, errors: Errors) -> None:
    """Compare each way's first step with float64; keep the errors.

    Eager code rounds its logits, which may make its gradient far wrong: that is told, and keeps
    nobody from being measured.
    """
    exact = ExactStep(setting, device)
    batch = make_batch(setting, device=device)
    for way in WAYS:
        step = TrainingStep(way, setting, device=device, autocast=AUTOCAST)
        tolerance = math.inf if way == "eager" else TOLERANCES[AUTOCAST]
        errors[way] = exact.check(step, step(batch), tolerance)


@pytest.mark.cpu_only
@pytest.mark.skipif(not STATUS.exists(), reason="the peak resident set is read from /proc")
@pytest.mark.parametrize("setting_name", MEMORY_SETTINGS)
def test_training_memory(benchmark: BenchmarkFixture, setting_name: str) -> None:
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}

    def measure_all() -> None:
        for way in WAYS:
            peaks[way].append(peak_bytes_in_subprocess("bench.detr", way, setting_name))

    benchmark.pedantic(measure_all, rounds=1)
    setting = SETTINGS[setting_name]
    benchmark.extra_info.update(
        {"kind": "training memory", "shape": setting_name, "pass": "training step"},
        dtype="float32",
        sizes=setting._asdict(),
        peak_bytes=peaks,
    )


class ExactStep:
    """The first step with stored maps in float64."""

    def __init__(self, setting: Setting, device: torch.device | str = "cpu") -> None:
        step = TrainingStep("eager", setting, torch.float64, device)
        batch = make_batch(setting, dtype=torch.float64, device=device)
        torch.set_default_dtype(torch.float64)  # transformers' loss makes tensors of its own
        try:
            self.losses = step(batch)
        finally:
            torch.set_default_dtype(torch.float32)
        self._map_gradient = step.map_gradient()

    def check(
        self, step: TrainingStep, losses: Losses, tolerance: float = TOLERANCES[torch.float32]
    ) -> dict[str, float]:
        """Relative errors of a first step's losses and, where it distils, its gradient.

        Raises:
            AssertionError: one is larger than the tolerance.
        """
        pairs: dict[str, tuple[Tensor, Tensor]] = {
            "detection": (losses.detection, self.losses.detection)
        }
        if losses.attention_kl is not None and self.losses.attention_kl is not None:
            pairs["attention_kl"] = (losses.attention_kl, self.losses.attention_kl)
            pairs["map gradient"] = (step.map_gradient(), self._map_gradient)
        errors = {n: ((x.double() - y).norm() / y.norm()).item() for n, (x, y) in pairs.items()}
        for name, error in errors.items():
            assert error <= tolerance, f"{step.way}: {name} is {error:.1e} off"
        return errors
