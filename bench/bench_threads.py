"""How forward and backward scale with threads, with eight heads and with a single one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.peers import CANDIDATES, forward_backward
from bench.rounds import measure_in_turn
from bench.workloads import SHAPES, make_workload

CORES = os.cpu_count() or 1
THREADS = sorted({1, *(n for n in (2, 4, 8, 16, 32, 64) if n < CORES), CORES})
WORKLOADS = {"dc5": SHAPES["dc5"], "dc5, one head": SHAPES["dc5"]._replace(H=1)}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """That many threads of torch, for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("shape_name", WORKLOADS)
def test_threads(benchmark: BenchmarkFixture, budget: float, shape_name: str, threads: int) -> None:
    workload = make_workload(WORKLOADS[shape_name], torch.float32)
    functions = {
        name: partial(forward_backward, CANDIDATES[name], workload) for name in ("sdpa", "attn_kd")
    }
    benchmark.extra_info.update(
        kind="threads",
        shape=shape_name,
        dtype="float32",
        threads=threads,
        sizes=WORKLOADS[shape_name]._asdict(),
    )
    benchmark.extra_info["pass"] = "forward+backward"
    measure_in_turn(benchmark, functions, budget=budget / 2)
