"""Peak memory of attention with its divergence, forward and backward, per candidate.

Each figure comes from a fresh process (see peak_memory.py); the median of three is reported. The
times that pytest-benchmark prints here are those of starting processes and mean nothing.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.peak_memory import STATUS, peak_bytes_in_subprocess
from bench.workloads import SHAPES

CANDIDATES = ("sdpa", "attn_kd", "sdpa_identity", "eager")
REPETITIONS = 3


@pytest.mark.skipif(not STATUS.exists(), reason="the peak resident set is read from /proc")
@pytest.mark.parametrize("shape_name", ["dc5"])
def test_peak_memory(benchmark: BenchmarkFixture, shape_name: str) -> None:
    shape = SHAPES[shape_name]
    peaks: dict[str, list[int]] = {name: [] for name in CANDIDATES}

    def measure_all() -> None:
        for name in CANDIDATES:
            peaks[name].append(peak_bytes_in_subprocess(name, shape_name, torch.get_num_threads()))

    benchmark.pedantic(measure_all, rounds=REPETITIONS)
    benchmark.extra_info.update(
        kind="memory",
        shape=shape_name,
        sizes=shape._asdict(),
        peak_bytes=peaks,
        map_bytes=4 * shape.B * shape.H * shape.Lq * shape.Lk,
    )
