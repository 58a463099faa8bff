"""Peak memory of attention with its divergence, forward and backward, per candidate.

On a CPU each figure comes from a fresh process, on a GPU from torch's allocator (see
peak_memory.py). The times that pytest-benchmark prints here mean nothing.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu_peers import GPU_CANDIDATES, PINNED_SDPA, split_refused
from bench.peak_memory import STATUS, growth_on_gpu, peak_bytes_in_subprocess
from bench.peers import forward_backward, needs_too_much_memory
from bench.workloads import GRID, SHAPES, Shape, make_workload

CANDIDATES = ("sdpa", "attn_kd", "sdpa_identity", "eager")
ON_GPU = (*PINNED_SDPA, "attn_kd cuda", *CANDIDATES[1:])
SMALL = Shape(B=1, H=1, Lq=16, Lk=16, D=32)


@pytest.mark.cpu_only
@pytest.mark.skipif(not STATUS.exists(), reason="the peak resident set is read from /proc")
@pytest.mark.parametrize("shape_name", [*GRID, "dc5", "video"])
def test_peak_memory(benchmark: BenchmarkFixture, shape_name: str) -> None:
    shape = (SHAPES | GRID)[shape_name]
    names = [name for name in CANDIDATES if name != "eager" or not needs_too_much_memory(shape)]
    peaks: dict[str, list[int]] = {name: [] for name in names}

    def measure_all() -> None:
        for name in names:
            peaks[name].append(peak_bytes_in_subprocess("bench.peak_memory", name, *shape))

    benchmark.pedantic(measure_all, rounds=1)
    benchmark.extra_info.update(
        {"kind": "memory", "shape": shape_name, "pass": "forward+backward", "dtype": "float32"},
        sizes=shape._asdict(),
        peak_bytes=peaks,
        map_bytes=shape.map_bytes,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape_name", [*GRID, "dc5", "video"])
def test_peak_memory_on_gpu(
    benchmark: BenchmarkFixture, device: torch.device, shape_name: str
) -> None:
    shape, dtype = (SHAPES | GRID)[shape_name], torch.bfloat16
    names = [name for name in ON_GPU if name != "eager" or not needs_too_much_memory(shape)]
    small = make_workload(SMALL, dtype, device=device)
    functions, refused = split_refused(
        {name: partial(forward_backward, GPU_CANDIDATES[name], small) for name in names}
    )
    workload = make_workload(shape, dtype, device=device)
    peaks: dict[str, list[int]] = {name: [] for name in functions}

    def measure_all() -> None:
        for name, warm_up in functions.items():
            warm_up()
            work = partial(forward_backward, GPU_CANDIDATES[name], workload)
            peaks[name].append(growth_on_gpu(work))

    benchmark.pedantic(measure_all, rounds=1)
    benchmark.extra_info.update(
        {"kind": "memory", "shape": shape_name, "pass": "forward+backward", "dtype": "bfloat16"},
        sizes=shape._asdict(),
        peak_bytes=peaks,
        refused=refused,
        map_bytes=shape.map_bytes,
    )
