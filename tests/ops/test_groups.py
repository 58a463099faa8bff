"""A teacher with several tokens for each key of the student: their mass together is compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_kd
from tests.ops import explicit
from tests.ops.cases import (
    DIVERGENCES,
    DTYPES,
    HEAD_REDUCTIONS,
    Sizes,
    assert_as_accurate_as_eager,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

SIZES = Sizes(Lq=70, Lk=55, G=4)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_reduction = pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)


def check(backend, sizes, dtype=torch.float32, **options):
    inputs = random_inputs(sizes, dtype)
    cotangents = random_cotangents(sizes, dtype, options.get("head_reduction", "none"))
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


@every_divergence
@every_reduction
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_and_gradients(backend, dtype, head_reduction, divergence):
    check(backend, SIZES, dtype, divergence=divergence, head_reduction=head_reduction)


@every_divergence
@pytest.mark.parametrize("G", [2, 3, 9, 100], ids=lambda n: f"{n} tokens a key")
def test_sizes_of_groups(backend, G, divergence):
    check(backend, SIZES._replace(G=G, Lk=13), divergence=divergence)


@every_divergence
@pytest.mark.parametrize("Lk", [1, 48, 97, 200], ids=lambda n: f"{n} keys")
def test_numbers_of_keys(backend, Lk, divergence):
    check(backend, Sizes(Lq=5, Lk=Lk, G=4), divergence=divergence)


@every_divergence
def test_other_teacher_heads_in_an_average(backend, divergence):
    check(backend, SIZES._replace(Ht=2), divergence=divergence, head_reduction="mean")


MASKS = {
    "key padding": lambda: torch.rand(SIZES.B, 1, 1, SIZES.Lk) > 0.4,
    "pairs": lambda: torch.rand(SIZES.B, 1, SIZES.Lq, SIZES.Lk) > 0.4,
    "additive": lambda: torch.randn(SIZES.Lq, SIZES.Lk).masked_fill(
        torch.rand(SIZES.Lq, SIZES.Lk) > 0.6, -torch.inf
    ),
}


@every_divergence
@every_reduction
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks_are_of_the_student_s_keys(backend, mask, head_reduction, divergence):
    options = {"divergence": divergence, "head_reduction": head_reduction}
    check(backend, SIZES, attn_mask=mask(), **options)


@every_divergence
def test_nan_in_padding_changes_nothing(backend, divergence):
    hidden = torch.rand(SIZES.B, 1, 1, SIZES.Lk) > 0.6
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    options = {"attn_mask": ~hidden, "divergence": divergence}
    expected = run_backend(backend, inputs, cotangents, **options)
    padding = hidden.transpose(-1, -2).repeat_interleave(SIZES.G, dim=2)
    poisoned = inputs._replace(teacher_key=inputs.teacher_key.masked_fill(padding, torch.nan))
    actual = run_backend(backend, poisoned, cotangents, **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


def all_tokens_lse(teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    return explicit.teacher_lse(teacher_query.double(), teacher_key.double()).float()


@every_divergence
def test_the_teacher_s_lse_is_over_all_its_tokens(backend, divergence):
    """What the teacher's own attention returns can be given on."""
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    lse = attn_kd.attention(
        inputs.teacher_query, inputs.teacher_key, inputs.teacher_key, backend=backend
    ).lse
    torch.testing.assert_close(lse, all_tokens_lse(inputs.teacher_query, inputs.teacher_key))
    given = run_backend(backend, inputs, cotangents, teacher_lse=lse, divergence=divergence)
    computed = run_backend(backend, inputs, cotangents, divergence=divergence)
    for name in computed:
        torch.testing.assert_close(given[name], computed[name], msg=name)


def test_a_group_of_equal_tokens_is_one_token(backend):
    """log of G equal exponentials adds the same log G to every logit."""
    sizes = SIZES._replace(G=1)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    expected = run_backend(backend, inputs, cotangents)
    repeated = inputs._replace(teacher_key=inputs.teacher_key.repeat_interleave(4, dim=2))
    actual = run_backend(backend, repeated, cotangents)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
