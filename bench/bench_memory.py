"""Peak memory of attention with its divergence, forward and backward, per candidate.

Each figure comes from a fresh process (see peak_memory.py). The times that pytest-benchmark prints
here are those of starting processes and mean nothing.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.peak_memory import STATUS, peak_bytes_in_subprocess
from bench.peers import needs_too_much_memory
from bench.workloads import GRID, SHAPES

CANDIDATES = ("sdpa", "attn_kd", "sdpa_identity", "eager")


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
