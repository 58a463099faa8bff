"""Peak memory is that of the attention loss, whatever ran before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_kd.report import memory as measuring
from attn_kd.report.memory import (
    AttentionMemory,
    _eager_loss,
    _fused_loss,
    _inputs,
    measure_attention_memory,
)
from attn_kd.report.table import memory_sentence


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_measurement_that_fails_is_a_warning_with_its_reason(monkeypatch):
    monkeypatch.setattr(measuring, "WAYS", ("unheard-of",))
    with pytest.warns(UserWarning, match="unheard-of"):
        assert measure_attention_memory(tokens=8) is None


@pytest.mark.parametrize(("fused_bytes", "told"), [(10_000_000, True), (0, False)])
def test_ratio_is_told_where_both_peaks_grow(fused_bytes, told):
    sentence = memory_sentence(AttentionMemory(8, 1, 4, "cpu", fused_bytes, 30_000_000))
    assert "eager 30 MB" in sentence
    assert ("3.0 times as much" in sentence) == told
