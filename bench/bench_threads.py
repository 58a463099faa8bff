"""How forward and backward scale with threads, and whether it matters how the work is split."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.peers import CANDIDATES, PASSES, forward_backward
from bench.rounds import measure_in_turn
from bench.workloads import SHAPES, Shape, make_workload

pytestmark = pytest.mark.cpu_only
CORES = os.cpu_count() or 1
THREADS = sorted({1, *(n for n in (2, 4, 8, 16, 32, 64) if n < CORES), CORES})
WORKLOADS = {"dc5": SHAPES["dc5"], "dc5, one head": SHAPES["dc5"]._replace(H=1)}
# As many logits, so as much arithmetic, in 64 maps and in one.
SPLITS = {"": Shape(8, 8, 1064, 1064, 32), ", one head": Shape(1, 1, 8512, 8512, 32)}


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("shape_name", WORKLOADS)
def test_threads(benchmark: BenchmarkFixture, budget: float, shape_name: str, threads: int) -> None:
    workload = make_workload(WORKLOADS[shape_name], torch.float32)
    functions = {
        name: partial(forward_backward, CANDIDATES[name], workload) for name in ("sdpa", "attn_kd")
    }
    benchmark.extra_info.update(
        {"kind": "threads", "shape": shape_name, "pass": "forward+backward", "dtype": "float32"},
        threads=threads,
        sizes=WORKLOADS[shape_name]._asdict(),
    )
    measure_in_turn(benchmark, functions, budget=budget / 2)


@pytest.mark.parametrize("pass_name", PASSES)
def test_split(benchmark: BenchmarkFixture, budget: float, pass_name: str) -> None:
    """Equal work as B·H = 64 and as B·H = 1: a kernel that only splits over heads has one task."""
    functions = {}
    for suffix, shape in SPLITS.items():
        workload = make_workload(shape, torch.float32)
        for name in ("sdpa", "attn_kd"):
            functions[name + suffix] = partial(PASSES[pass_name], CANDIDATES[name], workload)
    benchmark.extra_info.update(
        {"kind": "split", "shape": "64-heads", "pass": pass_name, "dtype": "float32"},
        sizes=SPLITS[""]._asdict(),
    )
    measure_in_turn(benchmark, functions, budget=budget)
