"""Head-averaged maps: values and gradients, with as many teacher heads as there are."""

from __future__ import annotations

import math

import pytest
import torch

import attn_kd
from tests.ops import explicit
from tests.ops.cases import (
    DIVERGENCES,
    DTYPES,
    Cotangents,
    Sizes,
    assert_as_accurate_as_eager,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

MEAN = {"head_reduction": "mean"}
SIZES = Sizes(Lq=70, Lk=110)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
teacher_heads = pytest.mark.parametrize("Ht", [1, 3, 7], ids=lambda n: f"{n} teacher heads")


def check(backend, sizes, dtype=torch.float32, *, spread=1.0, roundings=None, **options):
    inputs = random_inputs(sizes, dtype, spread=spread)
    cotangents = random_cotangents(sizes, dtype, "mean")
    options |= MEAN
    actual = run_backend(backend, inputs, cotangents, **options)
    assert actual["kl"].shape == (sizes.B, sizes.Lq)
    assert_as_accurate_as_eager(actual, inputs, cotangents, roundings=roundings, **options)


@every_divergence
@every_dtype
@teacher_heads
def test_values_and_gradients(backend, Ht, dtype, divergence):
    check(backend, SIZES._replace(Ht=Ht), dtype, divergence=divergence)


@every_divergence
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (1, 50), (3, 200), (200, 3)], ids=lambda n: str(n))
def test_lengths_that_differ(backend, Lq, Lk, divergence):
    check(backend, Sizes(Lq=Lq, Lk=Lk, Ht=2), divergence=divergence)


@every_divergence
@pytest.mark.parametrize(("D", "Dv", "Dt"), [(32, 8, 64), (1, 40, 3), (256, 3, 1)])
def test_head_dims_that_differ(backend, D, Dv, Dt, divergence):
    check(backend, Sizes(D=D, Dv=Dv, Dt=Dt, Ht=2), divergence=divergence)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_twice_the_error_of_eager_code_at_the_size_of_an_encoder(backend, dtype, divergence):
    sizes = Sizes(B=1, H=8, Lq=100, Lk=169, D=32, Dv=32, Dt=32)
    check(backend, sizes, dtype, roundings=0, divergence=divergence)


@every_divergence
@teacher_heads
def test_keys_whose_probabilities_underflow_in_every_head(backend, Ht, divergence):
    """Logits spread over hundreds of nats; float32 has probabilities down to 87 below the row's."""
    check(backend, SIZES._replace(Ht=Ht), spread=60.0, divergence=divergence)


def test_a_key_that_only_the_teacher_sees_pulls_the_student(backend):
    """KL(teacher ‖ student) has the gradient a - b, here -1, and every head the share it has of a.

    The logit of key 1 lies 200 and 202 nats below that of key 0 in the student's heads: their
    shares of its average are 1 : e^-2.
    """
    query = torch.ones(1, 2, 1, 1)
    key = torch.tensor([[0.0, -200.0], [0.0, -202.0]])[None, ..., None].requires_grad_()
    teacher_key = torch.tensor([-200.0, 0.0])[None, None, :, None]
    kl = attn_kd.attention_kl(
        *(query, key, torch.zeros(1, 2, 2, 1), query[:, :1], teacher_key),
        divergence="forward_kl",
        head_reduction="mean",
        backend=backend,
    ).kl
    (grad,) = torch.autograd.grad(kl.sum(), key)
    share = 1 / (1 + math.exp(-2))
    expected = torch.tensor([[share, -share], [1 - share, share - 1]])
    torch.testing.assert_close(grad[0, :, :, 0], expected)
    torch.testing.assert_close(kl, torch.tensor([[200 + math.log(2 * share)]]))


@every_divergence
@pytest.mark.parametrize("reached", Cotangents._fields)
def test_gradient_through_each_result_alone(backend, reached, divergence):
    inputs = random_inputs(SIZES)
    cotangents = random_cotangents(SIZES, head_reduction="mean").only(reached)
    options = {"divergence": divergence, **MEAN}
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


MASKS = {
    "key padding": lambda: torch.rand(SIZES.B, 1, 1, SIZES.Lk) > 0.4,
    "pairs": lambda: torch.rand(SIZES.Lq, SIZES.Lk) > 0.4,
    "additive": lambda: torch.randn(SIZES.Lq, SIZES.Lk),
}


@every_divergence
@teacher_heads
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks_common_to_all_heads(backend, mask, Ht, divergence):
    check(backend, SIZES._replace(Ht=Ht), attn_mask=mask(), divergence=divergence)


@every_divergence
def test_a_mask_for_each_head(backend, divergence):
    """What one head hides and another shows counts with the share of those that show it."""
    mask = torch.rand(SIZES.B, SIZES.H, SIZES.Lq, SIZES.Lk) > 0.4
    mask[:, 0, 3] = False  # a row that only this head does not see
    mask[:, :, 5] = False  # a row that no head sees
    check(backend, SIZES, attn_mask=mask, divergence=divergence)


@every_divergence
@teacher_heads
def test_rows_that_see_nothing(backend, Ht, divergence):
    mask = torch.rand(SIZES.B, 1, SIZES.Lq, SIZES.Lk) > 0.3
    mask[:, :, [0, 17, 64]] = False
    inputs = random_inputs(SIZES._replace(Ht=Ht))
    cotangents = random_cotangents(SIZES, head_reduction="mean")
    options = {"divergence": divergence, "attn_mask": mask, **MEAN}
    actual = run_backend(backend, inputs, cotangents, **options)
    assert (actual["kl"][:, [0, 17, 64]] == 0).all()
    assert (actual["grad_query"][:, :, [0, 17, 64]] == 0).all()
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


@every_divergence
@teacher_heads
def test_given_teacher_lse(backend, Ht, divergence):
    sizes = SIZES._replace(Ht=Ht)
    inputs = random_inputs(sizes)
    lse = explicit.teacher_lse(*inputs.to(torch.float64)[3:]).float()
    cotangents = random_cotangents(sizes, head_reduction="mean")
    options = {"divergence": divergence, "teacher_lse": lse, **MEAN}
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


@every_divergence
def test_one_head_is_its_own_average(backend, divergence):
    sizes = SIZES._replace(H=1)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    each = run_backend(backend, inputs, cotangents, divergence=divergence)
    averaged = run_backend(
        backend,
        inputs,
        cotangents._replace(kl=cotangents.kl[:, 0]),
        divergence=divergence,
        **MEAN,
    )
    each["kl"] = each["kl"][:, 0]
    for name in each:
        torch.testing.assert_close(averaged[name], each[name], msg=name)


@every_divergence
def test_the_order_of_heads_does_not_matter(backend, divergence):
    """As many teacher heads as student heads are not paired."""
    query, key, value, teacher_query, teacher_key = random_inputs(SIZES)
    options = {"divergence": divergence, "backend": backend, **MEAN}
    order = torch.tensor([2, 0, 1])
    expected = attn_kd.attention_kl(query, key, value, teacher_query, teacher_key, **options)
    shuffled = attn_kd.attention_kl(
        query, key, value, teacher_query[:, order], teacher_key[:, order], **options
    )
    torch.testing.assert_close(shuffled.kl, expected.kl)


@every_divergence
def test_identical_teacher_and_student(backend, divergence):
    sizes = SIZES._replace(Dt=8)
    inputs = random_inputs(sizes)
    inputs = inputs._replace(teacher_query=inputs.query, teacher_key=inputs.key)
    cotangents = random_cotangents(sizes, head_reduction="mean").only("kl")
    actual = run_backend(backend, inputs, cotangents, divergence=divergence, **MEAN)
    eps = torch.finfo(torch.float32).eps
    assert actual["kl"].abs().max() <= 16 * eps
    assert actual["grad_query"].abs().max() <= 64 * eps
    assert actual["grad_key"].abs().max() <= 64 * eps


@every_divergence
@pytest.mark.parametrize("threads", [3], indirect=True, ids=lambda n: f"{n} threads")
def test_threads(cpu_backend, threads, divergence):
    check(cpu_backend, Sizes(B=1, H=2, Lq=150, Lk=300, Ht=5), divergence=divergence)
