"""What a teacher cache saves in a training step, and what it costs on disk."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

pytest.importorskip("transformers")

from bench.accuracy import Errors
from bench.detr import SETTINGS
from bench.rounds import SUBJECT, measure_in_turn
from bench.teacher_cache import CACHED, WAYS, Example, make_example, sizes_of, steps_of

SETTING_NAMES = ("detr-tiny-416", "detr-r50-416")
SHARE = 0.25  # of the budget: three ways of two steps each, and a ratio well away from 1
TOLERANCE = 1e-3  # relative, of the divergence from records in float16


@pytest.fixture(scope="module", params=SETTING_NAMES)
def named_example(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Example]:
    name = request.param
    return name, make_example(SETTINGS[name], tmp_path_factory.mktemp(name))


@pytest.mark.cpu_only
@pytest.mark.parametrize("way", WAYS)
def test_teacher_cache(
    benchmark: BenchmarkFixture, budget: float, named_example: tuple[str, Example], way: str
) -> None:
    name, example = named_example
    first, errors = {}, Errors()

    def verify(step: str, divergence: Tensor) -> None:
        first[step] = divergence
        if step == CACHED:
            errors[step] = check(divergence, first[SUBJECT])

    benchmark.extra_info.update(
        {"kind": "teacher cache", "shape": name, "pass": way, "dtype": "float32"},
        sizes={**example.setting._asdict(), **sizes_of(example.cache)},
        errors=errors,
    )
    measure_in_turn(benchmark, steps_of(way, example), budget=SHARE * budget, verify=verify)


def check(divergence: Tensor, live: Tensor) -> dict[str, float]:
    """The relative error of a first step's divergence against that of the running teacher.

    Raises:
        AssertionError: it is larger than the rounding of records explains.
    """
    error = (torch.abs(divergence - live) / live).item()
    assert error <= TOLERANCE, f"attention_kl from the cache is {error:.1e} off"
    return {"attention_kl": error}
