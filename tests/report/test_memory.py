"""Peak memory is that of the attention loss, whatever ran before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_kd.report.memory import _eager_loss, _fused_loss, _inputs, measure_attention_memory


def test_both_ways_compute_the_same_loss():
    eager, fused = _inputs(40, 2, 8), _inputs(40, 2, 8)
    for loss, inputs in ((_eager_loss, eager), (_fused_loss, fused)):
        loss(*inputs).backward()
    for one, other in zip(eager[:3], fused[:3], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_eager_stores_maps_and_the_kernels_do_not():
    memory = measure_attention_memory(tokens=1024)
    # The student's log-map and map are kept for the backward pass, which makes a gradient of one.
    assert memory.eager_bytes > 3 * memory.map_bytes
    if memory.backend == "cpu":
        assert memory.fused_bytes < memory.map_bytes
