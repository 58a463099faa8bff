"""Every candidate of the benchmarks computes what it claims to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.accuracy import QUANTITIES, TOLERANCES, Checker, check, exact_head
from bench.peers import CANDIDATES, eager, forward_backward, fused
from bench.workloads import Shape, make_workload

SHAPE = Shape(B=2, H=2, Lq=37, Lk=53, D=16)
WITH_DIVERGENCE = ("attn_kd", "sdpa_identity", "eager")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).partition(".")[2])
@pytest.mark.parametrize("name", CANDIDATES)
def test_values_and_gradients_are_those_of_float64(name, dtype):
    errors = check(CANDIDATES[name], make_workload(SHAPE, dtype))
    assert ("kl" in errors) == (name in WITH_DIVERGENCE)
    assert {"output", "grad_query", "grad_key", "grad_value"} <= errors.keys()


def test_exact_values_do_not_depend_on_the_block_of_queries():
    head = make_workload(SHAPE, torch.float64).head(1, 0)
    whole = forward_backward(eager, head)
    in_blocks = exact_head(head, with_divergence=True, block=10)
    for expected, found in zip(whole, in_blocks, strict=True):
        torch.testing.assert_close(found, expected)


def test_exact_divergence_is_the_sum_over_a_log_a_over_b():
    head = make_workload(SHAPE, torch.float64).head(0, 0)
    scale = SHAPE.D**-0.5
    attention = (scale * head.query @ head.key.mT).softmax(-1)
    teacher = (scale * head.teacher_query @ head.teacher_key.mT).softmax(-1)
    divergence = exact_head(head, with_divergence=True)[1]
    torch.testing.assert_close(divergence, (attention * (attention / teacher).log()).sum(-1))


def test_a_forgotten_gradient_of_the_divergence_is_seen():
    def detached(*inputs):
        output, divergence = fused(*inputs)
        return output, divergence.detach() + 0 * output.float().sum(-1)

    workload = make_workload(SHAPE, torch.float32)
    errors = Checker(workload).errors(forward_backward(detached, workload))
    assert errors["grad_query"] > 0.1
    with pytest.raises(AssertionError, match=r"grad_query is .* off"):
        check(detached, workload)


def test_queries_without_gradients_are_left_out_and_the_gradients_of_keys_stay_exact():
    workload = make_workload(SHAPE, torch.float64)
    graded = torch.arange(SHAPE.Lq) % 5 == 0
    some = replace(
        workload,
        grad_output=workload.grad_output * graded[:, None],
        grad_kl=workload.grad_kl * graded,
    )
    result = forward_backward(eager, some)
    exact = exact_head(some.head(0, 1), with_divergence=True)
    assert exact[0].shape[2] == graded.sum()
    torch.testing.assert_close(exact[3][0, 0], result[3][0, 1])
    assert Checker(some).check(result).keys() == set(QUANTITIES)


def test_a_value_that_is_not_a_number_is_seen():
    def broken(*inputs):
        output, divergence = fused(*inputs)
        # in the last head alone
        factor = torch.ones(SHAPE.B, SHAPE.H, 1, 1).index_fill(1, torch.tensor(1), float("nan"))
        return output * factor, divergence

    with pytest.raises(AssertionError, match="output is nan off"):
        check(broken, make_workload(SHAPE, torch.float32))
