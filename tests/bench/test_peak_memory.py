"""Peak memory counts what work uses, at its peak, and not what was there before."""

from __future__ import annotations

import pytest
import torch

from bench.peak_memory import STATUS, growth_of_peak, peak_bytes_in_subprocess
from bench.workloads import Shape

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
MIB = 2**20


def test_what_is_given_back_counts_and_what_was_there_does_not():
    before = torch.ones(32 * MIB)  # 128 MiB

    def work() -> float:
        return torch.ones(16 * MIB).sum().item()  # 64 MiB, gone at the end

    assert 60 < growth_of_peak(work) / MIB < 80
    assert before.sum() > 0


def test_eager_code_needs_seven_maps_and_the_fused_operator_none():
    shape = Shape(B=1, H=2, Lq=1024, Lk=1024, D=16)
    peaks = {
        n: peak_bytes_in_subprocess("bench.peak_memory", n, *shape) for n in ("eager", "attn_kd")
    }
    assert 6 < peaks["eager"] / shape.map_bytes < 9
    assert peaks["attn_kd"] < shape.map_bytes
