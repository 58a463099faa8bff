"""Time of attention with its divergence from a teacher: attn_kd beside its peers.

One test per shape, pass and dtype; all candidates take turns within it (see rounds.py). What the
first call of each returns is compared with float64 before anything is timed.
"""

from __future__ import annotations

import os
import shutil
from functools import lru_cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.accuracy import Checker, Errors
from bench.peers import CANDIDATES, PASSES, compile_eager
from bench.rounds import measure_in_turn
from bench.workloads import GRID, SHAPES, Shape, Workload, make_workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_attention_kl(
    benchmark: BenchmarkFixture, budget: float, dtype_name: str, shape_name: str, pass_name: str
) -> None:
    benchmark.extra_info["kind"] = "time"
    shape = SHAPES[shape_name]
    names = candidates_for(shape, dtype_name)
    _measure(benchmark, budget, names, shape_name, shape, pass_name, dtype_name)


@pytest.mark.parametrize("shape_name", GRID)
def test_grid(benchmark: BenchmarkFixture, budget: float, shape_name: str) -> None:
    """Time against the number of tokens, together with dc5 and video above."""
    benchmark.extra_info["kind"] = "grid"
    shape = GRID[shape_name]
    names = [name for name in candidates_for(shape, "float32") if name != "compiled"]
    _measure(benchmark, budget / 2, names, shape_name, shape, "forward+backward", "float32")


def candidates_for(shape: Shape, dtype_name: str) -> list[str]:
    """Whose memory, time and compiler allow it."""
    if shape.has_many_logits:  # maps would not fit, and seconds a call are enough for three
        return ["sdpa", "attn_kd", *(["sdpa_identity"] if dtype_name == "float32" else [])]
    return [*CANDIDATES, *(["compiled"] if HAS_COMPILER else [])]


@lru_cache(maxsize=1)  # both passes of a shape need the same; then it may go
def _inputs(shape: Shape, dtype_name: str) -> tuple[Workload, Checker]:
    workload = make_workload(shape, DTYPES[dtype_name])
    return workload, Checker(workload)


def _measure(
    benchmark: BenchmarkFixture,
    budget: float,
    names: list[str],
    shape_name: str,
    shape: Shape,
    pass_name: str,
    dtype_name: str,
) -> None:
    workload, checker = _inputs(shape, dtype_name)
    run, errors = PASSES[pass_name], Errors()
    candidates = {name: CANDIDATES[name] for name in names if name != "compiled"}
    if "compiled" in names:
        candidates["compiled"] = compile_eager(run, workload)
    benchmark.extra_info.update(
        {"shape": shape_name, "pass": pass_name, "dtype": dtype_name},
        sizes=shape._asdict(),
        errors=errors,
    )
    measure_in_turn(
        benchmark,
        {name: partial(run, candidate, workload) for name, candidate in candidates.items()},
        budget=budget,
        verify=lambda name, result: errors.update({name: checker.check(result)}),
    )
