"""Rows whose logits rise along the keys, beyond what they are measured from.

Rises are in natural units; base 2 they are half as much again. Forward tiles have 96 keys; one
whose logits rise by more than 8, base 2, is swept twice (csrc/cpu/kernels/running_sums.h).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_kd import attention
from tests.csrc.test_kernels import every_arithmetic, every_reduction
from tests.ops.cases import (
    DIVERGENCES,
    Inputs,
    Results,
    Sizes,
    assert_as_accurate_as_eager,
    random_cotangents,
    random_inputs,
    run_backend,
    truth_of,
)

pytestmark = pytest.mark.usefixtures("instruction_set", "poisoned_scratch")

LK = 500
SIZES = Sizes(B=1, H=2, Lq=70, Lk=LK, D=16, Dv=12, Dt=16)
SPLIT = SIZES._replace(Lq=3, Lk=1100)
LAST = -1

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
given_or_computed = pytest.mark.parametrize(
    "given", [False, True], ids=["computes teacher_lse", "given teacher_lse"]
)


def stairs(step: float, keys: int = LK) -> Tensor:
    """Logits that are higher by `step` on every further hundred keys."""
    return step * torch.arange(keys).div(100, rounding_mode="floor")


def spike(height: float, at: int, keys: int = LK) -> Tensor:
    """One key whose logits lie above all others."""
    return torch.zeros(keys).index_fill(0, torch.tensor([at % keys]), height)


RISES = {
    "gentle": stairs(2.0),
    "at the limit": stairs(5.5),
    "steep": stairs(22.2),
    "steeper": stairs(40.0),
    "beyond the exponents": stairs(300.0),
    "falling": stairs(-40.0),
    "a hill": spike(18.0, 250),
    "a summit": spike(60.0, 250),
    "the last key": spike(18.0, LAST),
    "the last key, steep": spike(100.0, LAST),
}
every_rise = pytest.mark.parametrize("rise", RISES.values(), ids=RISES.keys())


def rising(inputs: Inputs, rise: Tensor, rows: Tensor | None = None) -> Inputs:
    """The inputs with the student's logits raised by `rise` [Lk], on all rows or where `rows` is 1.

    By a component of query and key: the scale is 1/4, as head_dim is 16, and its logit 4 rise / 4.
    """
    query, key = inputs.query.clone(), inputs.key.clone()
    query[..., 0] = 4.0 if rows is None else 4.0 * rows
    key[..., 0] = rise.to(key.dtype)
    return inputs._replace(query=query, key=key)


def rising_teacher(inputs: Inputs, rise: Tensor) -> Inputs:
    """The same of the teacher's logits."""
    student = Inputs(inputs.teacher_query, inputs.teacher_key, *inputs[2:])
    raised = rising(student, rise)
    return inputs._replace(teacher_query=raised.query, teacher_key=raised.key)


def check(
    inputs: Inputs, sizes: Sizes, *, given: bool = False, teacher_lse: float = 0.0, **options
) -> None:
    """Check against float64 and eager; `teacher_lse` is how large the teacher's is, about."""
    dtype = inputs.query.dtype
    head_reduction = options.get("head_reduction", "none")
    cotangents = random_cotangents(sizes, dtype, head_reduction)
    if given:
        options["teacher_lse"] = run_backend(
            "cpu",
            Inputs(inputs.teacher_query, inputs.teacher_key, inputs.value, *inputs[3:]),
            cotangents,
            **options,
        )["lse"]
    actual = run_backend("cpu", inputs, cotangents, **options)
    if dtype == torch.float64:
        truth = truth_of(inputs, cotangents, **options)
        for name, result in actual.items():
            torch.testing.assert_close(result, truth[name], rtol=1e-11, atol=1e-11)
    else:
        # The largest logit's own rounding.
        roundings = 4 + max(actual["lse"].abs().max().item(), teacher_lse) / 4
        assert_as_accurate_as_eager(actual, inputs, cotangents, roundings=roundings, **options)


@every_arithmetic
@every_divergence
@every_rise
def test_of_the_student(rise, divergence, dtype):
    check(rising(random_inputs(SIZES, dtype), rise), SIZES, divergence=divergence)


@every_arithmetic
@every_divergence
@every_rise
def test_of_the_teacher(rise, divergence, dtype):
    inputs = rising_teacher(random_inputs(SIZES, dtype), rise)
    check(inputs, SIZES, divergence=divergence, teacher_lse=rise.max().item())


@every_arithmetic
@given_or_computed
@every_rise
def test_of_both(rise, given, dtype):
    """By a mask, which both maps share."""
    check(random_inputs(SIZES, dtype), SIZES, given=given, attn_mask=rise.expand(1, 1, 1, LK))


@every_arithmetic
@pytest.mark.parametrize("scale", [-0.5, -8.0, -30.0])
def test_of_negative_scales(scale, dtype):
    """The highest logit is of the lowest product."""
    check(random_inputs(SIZES, dtype), SIZES, scale=scale)


@every_arithmetic
@pytest.mark.parametrize("height", [3.09375, 3.5, 4.9375])
def test_of_one_key_beside_another(height, dtype):
    """Of two probabilities: what rounding takes from the larger must not reach the output."""
    inputs = random_inputs(SIZES, dtype)
    rise = torch.full((LK,), -60.0)
    rise[10], rise[250] = 0.0, height
    inputs = rising(inputs._replace(query=torch.zeros_like(inputs.query)), rise)
    check(inputs, SIZES)


@every_reduction
@every_rise
def test_before_a_second_pass(rise, head_reduction):
    inputs = rising(random_inputs(SIZES), rise)
    check(inputs, SIZES, divergence="js", head_reduction=head_reduction)


@every_arithmetic
@pytest.mark.parametrize("rise", [stairs(4.0, 1100), stairs(12.0, 1100), spike(60.0, 900, 1100)])
def test_of_few_rows_whose_keys_are_split(rise, dtype):
    check(rising(random_inputs(SPLIT, dtype), rise), SPLIT)


@every_arithmetic
@every_rise
def test_under_dropout(rise, dtype):
    """Of probabilities that were kept, and their gradients, nothing overflows."""
    inputs, cotangents = rising(random_inputs(SIZES, dtype), rise), random_cotangents(SIZES, dtype)
    torch.manual_seed(0)
    actual = run_backend("cpu", inputs, cotangents, dropout_p=0.25)
    undropped = truth_of(inputs, cotangents)
    assert all(result.isfinite().all() for result in actual.values())
    torch.testing.assert_close(actual["lse"].double(), undropped["lse"], rtol=1e-5, atol=1e-5)


def of_rows(results: Results, rows: Tensor) -> Results:
    """What each row has alone."""
    names = ("output", "kl", "lse", "grad_query")
    return {name: results[name][:, :, rows] for name in names}


@every_arithmetic
@given_or_computed
@every_rise
def test_a_row_does_not_depend_on_its_neighbours(rise, given, dtype):
    """Its bits are the same whether others of its panel rise, steeply or at all."""
    steep = torch.arange(SIZES.Lq) % 3 == 1
    inputs, cotangents = random_inputs(SIZES, dtype), random_cotangents(SIZES, dtype)
    some = rising(inputs, rise, steep)
    none = rising(inputs, rise, torch.zeros(SIZES.Lq))
    options = {}
    if given:
        options["teacher_lse"] = run_backend("cpu", none, cotangents)["lse"]
    actual, expected = (run_backend("cpu", each, cotangents, **options) for each in (some, none))
    of_flat, of_steep = of_rows(actual, ~steep), of_rows(actual, steep)
    for name, result in of_rows(expected, ~steep).items():
        assert torch.equal(of_flat[name], result), name
    every = run_backend("cpu", rising(inputs, rise), cotangents, **options)
    for name, result in of_rows(every, steep).items():
        assert torch.equal(of_steep[name], result), name


@pytest.mark.parametrize("origin", torch.linspace(-8.49, -8.01, 25).tolist())
def test_a_key_at_the_limit(origin):
    """One that lies by all of the room above the first: that its tile is searched, because a
    neighbour's logits rise there, moves nothing."""
    first = torch.tensor(origin)
    limit = torch.nextafter(first + 8.0, torch.tensor(1.0))
    assert limit - first == 8.0  # rounded
    query = torch.eye(2)[None, None]
    key = torch.full((1, 1, 192, 2), -200.0)
    key[..., 1] = 0.0
    key[0, 0, 5, 0], key[0, 0, 100, 0] = first, limit
    value = torch.randn(1, 1, 192, 8, generator=torch.Generator().manual_seed(0))
    beside = key.clone()
    beside[0, 0, 150, 1] = 60.0
    # Logits, base 2, are the keys themselves.
    alone, searched = (
        attention(query, each, value, scale=math.log(2.0), backend="cpu") for each in (key, beside)
    )
    assert torch.equal(alone.output[:, :, 0], searched.output[:, :, 0])
    assert torch.equal(alone.lse[:, :, 0], searched.lse[:, :, 0])
