"""The operator's modes that are timed: compared with the reference."""

from __future__ import annotations

import pytest
import torch

import attn_kd
from bench.bench_modes import MODES, PASSES, Mode, check
from bench.workloads import Shape, make_workload

SHAPE = Shape(B=2, H=2, Lq=7, Lk=9, D=8)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_computes_what_the_reference_does(name):
    check(MODES[name], SHAPE)


def test_the_divergence_alone_has_no_output_and_no_gradient_of_the_value():
    workload = make_workload(SHAPE, torch.float32)
    run = PASSES["forward+backward"]
    assert len(run(MODES["attention_kl_div"], workload)) == 3  # kl and two gradients
    assert len(run(MODES["attn_kd"], workload)) == 5


def test_a_wrong_mode_is_seen():
    def scaled(*inputs, backend=None, **options):
        factor = 1.0 if backend == "reference" else 1.001
        result = attn_kd.attention_kl(*inputs, backend=backend, **options)
        return result._replace(kl=factor * result.kl)

    with pytest.raises(AssertionError, match=r"1.0e-03 off"):
        check(Mode(scaled, {}), SHAPE)
