"""Time of attention with its divergence from a teacher: attn_kd beside its peers.

One test per shape, pass and dtype; all candidates take turns within it (see rounds.py), after each
has been checked against float64 at the size that is timed.
"""

from __future__ import annotations

import os
import shutil
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.accuracy import check
from bench.peers import CANDIDATES, LINEAR_MEMORY, PASSES, Candidate, compile_eager
from bench.rounds import measure_in_turn
from bench.workloads import SHAPES, make_workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# torch.compile needs half a minute and more for each of these, and a C++ compiler.
COMPILED = {("coco", "float32"), ("dc5", "float32")}
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None
ONLY_LINEAR_MEMORY = {"video"}  # one float32 map would take 8.6 GB


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(
    "shape_name",
    [pytest.param(name, marks=pytest.mark.slow if name == "video" else ()) for name in SHAPES],
)
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_attention_kl(
    benchmark: BenchmarkFixture,
    budget: float,
    dtype_name: str,
    shape_name: str,
    pass_name: str,
) -> None:
    workload = make_workload(SHAPES[shape_name], DTYPES[dtype_name])
    candidates = _candidates(shape_name, dtype_name)
    benchmark.extra_info.update(
        {"kind": "time", "shape": shape_name, "pass": pass_name, "dtype": dtype_name},
        sizes=SHAPES[shape_name]._asdict(),
        errors={name: check(candidate, workload) for name, candidate in candidates.items()},
    )
    run = PASSES[pass_name]
    functions = {name: partial(run, candidate, workload) for name, candidate in candidates.items()}
    measure_in_turn(benchmark, functions, budget=budget)


def _candidates(shape_name: str, dtype_name: str) -> dict[str, Candidate]:
    candidates = dict(CANDIDATES)
    if shape_name in ONLY_LINEAR_MEMORY:
        candidates = {name: candidates[name] for name in LINEAR_MEMORY}
    if (shape_name, dtype_name) in COMPILED and HAS_COMPILER:
        candidates["compiled"] = compile_eager()
    return candidates
