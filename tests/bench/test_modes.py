"""The operator's modes that are timed: compared with the reference."""

from __future__ import annotations

import pytest
import torch

import attn_kd
from attn_kd.ops.checks import DIVERGENCES
from bench.bench_modes import DTYPES, MEASURED, MODES, PASSES, Mode, check
from bench.targets import GOALS, HEAD_MEANS
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


@pytest.mark.parametrize(("mean", "each"), HEAD_MEANS.items(), ids=str)
def test_a_head_mean_is_compared_with_the_same_divergence_of_every_head(mean, each):
    assert MODES[mean].options == {**MODES[each].options, "head_reduction": "mean"}


def test_every_divergence_has_its_head_mean():
    held = {MODES[name].options.get("divergence", "reverse_kl") for name in HEAD_MEANS}
    assert held == set(DIVERGENCES)


def test_goals_are_of_modes_that_are_measured():
    goals = [goal for goal in GOALS if goal.kind == "modes"]
    assert len(goals) == 2 * len(HEAD_MEANS) + 2
    for goal in goals:
        assert {goal.candidate, goal.peer} <= set(MEASURED[goal.shape])
        assert goal.dtype in DTYPES and goal.pass_name in PASSES
