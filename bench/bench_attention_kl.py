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
from bench.devices import clock_for
from bench.gpu_peers import PINNED_SDPA, candidates_on, split_refused
from bench.peers import PASSES, compile_eager
from bench.rounds import measure_in_turn
from bench.workloads import GRID, SHAPES, Shape, Workload, make_workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRID_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}  # what one trains in
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_attention_kl(
    benchmark: BenchmarkFixture,
    budget: float,
    device: torch.device,
    dtype_name: str,
    shape_name: str,
    pass_name: str,
) -> None:
    shape = SHAPES[shape_name]
    benchmark.extra_info.update(kind="time", shape=shape_name)
    names = candidates_for(shape, dtype_name, device)
    _measure(benchmark, budget, names, shape, pass_name, dtype_name, device)


@pytest.mark.parametrize("shape_name", GRID)
def test_grid(
    benchmark: BenchmarkFixture, budget: float, device: torch.device, shape_name: str
) -> None:
    """Time against the number of tokens, together with dc5 and video above."""
    shape, dtype_name = GRID[shape_name], GRID_DTYPE[device.type]
    benchmark.extra_info.update(kind="grid", shape=shape_name)
    names = candidates_for(shape, dtype_name, device)
    names = [name for name in names if name != "compiled"]
    _measure(benchmark, budget / 2, names, shape, "forward+backward", dtype_name, device)


def candidates_for(shape: Shape, dtype_name: str, device: torch.device) -> list[str]:
    """Whose memory, time and compiler allow it."""
    everybody = candidates_on(device)
    if shape.has_many_logits:  # maps would not fit; a CPU takes seconds a call, enough for three
        chosen = ["sdpa", *PINNED_SDPA, "attn_kd", "attn_kd cuda"]
        if dtype_name == "float32" or device.type != "cpu":
            chosen.append("sdpa_identity")
        return [name for name in chosen if name in everybody]
    return [*everybody, *(["compiled"] if HAS_COMPILER else [])]


@lru_cache(maxsize=1)  # both passes of a shape need the same; then it may go
def _inputs(shape: Shape, dtype_name: str, device: torch.device) -> tuple[Workload, Checker]:
    workload = make_workload(shape, DTYPES[dtype_name], device=device)
    return workload, Checker(workload)


def _measure(
    benchmark: BenchmarkFixture,
    budget: float,
    names: list[str],
    shape: Shape,
    pass_name: str,
    dtype_name: str,
    device: torch.device,
) -> None:
    workload, checker = _inputs(shape, dtype_name, device)
    run, errors = PASSES[pass_name], Errors()
    candidates = {name: candidates_on(device)[name] for name in names if name != "compiled"}
    if "compiled" in names:
        candidates["compiled"] = compile_eager(run, workload)
    functions, refused = split_refused(
        {name: partial(run, candidate, workload) for name, candidate in candidates.items()}
    )
    benchmark.extra_info.update(
        {"pass": pass_name, "dtype": dtype_name, "refused": refused},
        sizes=shape._asdict(),
        errors=errors,
    )
    measure_in_turn(
        benchmark,
        functions,
        budget=budget,
        verify=lambda name, result: errors.update({name: checker.check(result)}),
        clock=clock_for(device),
    )
