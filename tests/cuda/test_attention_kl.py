"""The CUDA kernels on the emulated GPU, against float64 and eager code in their dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops.cases import (
    Cotangents,
    Inputs,
    Sizes,
    assert_as_accurate_as_eager,
    assert_equal,
    filled,
    name_of,
    random_cotangents,
    random_inputs,
)
from tests.ops.explicit import teacher_lse
from tests.ops.layouts import far_apart, heads_after_length, packed

HEAD_DIMS = (32, 64)
DTYPES = (torch.bfloat16, torch.float16)
# Lq, Lk: less than a warp's rows, a whole one, one more, several tiles, DETR's 13 x 13 tokens
LENGTHS = ((1, 1), (16, 16), (17, 63), (100, 300), (169, 169))

every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_length = pytest.mark.parametrize("lengths", LENGTHS, ids="{0[0]}x{0[1]}".format)


def case(
    head_dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    lengths: tuple[int, int] = (70, 90),
    **options,
) -> tuple[Inputs, Cotangents]:
    """Random inputs of one batch and two heads, or as the options say, and cotangents.

    These have the dtypes and the layout that autograd would give them.
    """
    sizes = Sizes(**{"B": 1, "H": 2} | options.pop("sizes", {}))
    sizes = sizes._replace(Lq=lengths[0], Lk=lengths[1], D=head_dim, Dv=head_dim, Dt=head_dim)
    exact = random_cotangents(sizes, dtype)
    cotangents = Cotangents(heads_after_length(exact.output), exact.kl.float(), exact.lse.float())
    return random_inputs(sizes, dtype, **options), cotangents


def check(gpu, inputs: Inputs, cotangents: Cotangents, **options) -> None:
    actual = gpu.run(inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


def lse_of_teacher(inputs: Inputs, attn_mask: Tensor | None = None) -> Tensor:
    query, key = inputs.teacher_query.double(), inputs.teacher_key.double()
    return teacher_lse(query, key, attn_mask=attn_mask).float()


@every_length
@every_dtype
@every_head_dim
def test_teacher_lse_given(gpu, head_dim, dtype, lengths):
    inputs, cotangents = case(head_dim, dtype, lengths)
    check(gpu, inputs, cotangents, teacher_lse=lse_of_teacher(inputs))


@every_dtype
@every_head_dim
def test_teacher_lse_computed(gpu, head_dim, dtype):
    inputs, cotangents = case(head_dim, dtype)
    check(gpu, inputs, cotangents)
    own = gpu.forward(inputs)["teacher_lse"]
    torch.testing.assert_close(own, lse_of_teacher(inputs), rtol=1e-6, atol=1e-6)


@every_head_dim
def test_teacher_does_not_touch_the_attention(gpu, head_dim):
    inputs, cotangents = case(head_dim)
    cotangents = cotangents._replace(kl=None)
    alone = gpu.run(inputs._replace(teacher_query=None, teacher_key=None), cotangents)
    assert "kl" not in alone
    beside = gpu.run(inputs, cotangents, teacher_lse=lse_of_teacher(inputs))
    assert_equal(beside, alone)


@pytest.mark.parametrize("name", Cotangents._fields)
@every_head_dim
def test_gradient_arrives_at_one_result(gpu, head_dim, name):
    inputs, cotangents = case(head_dim)
    check(gpu, inputs, cotangents.only(name))


def test_one_launch_each_way_and_no_bank_conflicts(gpu):
    inputs, cotangents = case()
    results = gpu.forward(inputs)
    assert (gpu.launches, gpu.bank_conflicts) == (1, 0)
    gpu.backward(inputs, results, cotangents)
    assert (gpu.launches, gpu.bank_conflicts) == (1, 0)


@pytest.mark.parametrize("shape", [(2, 1, 1, 90), (2, 2, 1, 90), (90,), (1,)], ids=str)
def test_bool_mask(gpu, shape):
    inputs, cotangents = case(sizes={"B": 2})
    check(gpu, inputs, cotangents, attn_mask=torch.rand(shape) > 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=name_of)
def test_additive_mask(gpu, dtype):
    inputs, cotangents = case()
    mask = torch.randn(1, 1, 1, 90).masked_fill(torch.rand(90) < 0.3, -torch.inf)
    check(gpu, inputs, cotangents, attn_mask=mask.to(dtype))


@pytest.mark.parametrize("arriving", [("output", "kl", "lse"), ("output",)], ids=str)
@every_head_dim
def test_large_bias_beside_rows_that_do_not_exist(gpu, head_dim, arriving):
    """100 added to a logit of 0 has no float32 exponential, which no such row may get."""
    inputs, cotangents = case(head_dim)
    mask = torch.full((1, 1, 1, 90), 100.0)
    check(gpu, inputs, cotangents.only(*arriving), attn_mask=mask)


@every_head_dim
@pytest.mark.parametrize("given", [False, True], ids=["lse computed", "lse given"])
def test_padding_of_whole_tiles_and_batches(gpu, head_dim, given):
    """The first tile of one batch is hidden, and all keys of the other, whatever they hold."""
    inputs, cotangents = case(head_dim, sizes={"B": 2})
    mask = torch.arange(90) >= 70
    mask = torch.stack([mask, torch.zeros_like(mask)])[:, None, None]
    options = {"attn_mask": mask}
    if given:
        options["teacher_lse"] = lse_of_teacher(inputs, mask)
    clean = gpu.run(inputs, cotangents, **options)
    assert_as_accurate_as_eager(clean, inputs, cotangents, **options)
    assert not clean["output"][1].any()
    assert clean["lse"][1].eq(-torch.inf).all()
    dirty = gpu.run(filled(inputs, ~mask, torch.nan), cotangents, **options)
    assert_equal(dirty, clean)


def test_row_that_sees_no_key_ignores_what_arrives(gpu):
    inputs, cotangents = case()
    everything = Cotangents(*(torch.full_like(c, torch.nan) for c in cotangents))
    results = gpu.run(inputs, everything, attn_mask=torch.zeros(90, dtype=torch.bool))
    for name in ("output", "kl", "grad_query", "grad_key", "grad_value"):
        assert not results[name].any(), name


def test_nan_stays_in_its_query_row(gpu):
    inputs, cotangents = case()
    clean = gpu.run(inputs, cotangents)
    inputs.query[0, 1, 20, 3] = torch.nan
    dirty = gpu.run(inputs, cotangents)
    for name in ("output", "kl", "lse", "grad_query"):
        assert dirty[name][0, 1, 20].isnan().all(), name
        dirty[name][0, 1, 20] = clean[name][0, 1, 20]
        assert torch.equal(dirty[name], clean[name]), name
    assert torch.equal(dirty["grad_key"][0, 0], clean["grad_key"][0, 0])


@every_head_dim
def test_large_logits_and_own_scales(gpu, head_dim):
    inputs, cotangents = case(head_dim, spread=6.0)
    check(gpu, inputs, cotangents, scale=0.3, teacher_scale=0.1)


@pytest.mark.parametrize("given", [False, True], ids=["lse computed", "lse given"])
def test_student_equal_to_teacher(gpu, given):
    inputs, cotangents = case(lengths=(33, 169), spread=3.0)
    inputs = inputs._replace(teacher_query=inputs.query, teacher_key=inputs.key)
    options = {"teacher_lse": lse_of_teacher(inputs)} if given else {}
    results = gpu.run(inputs, cotangents.only("kl"), **options)
    # A few roundings of logits and LSEs of about 10
    assert results["kl"].abs().max() < 5e-6
    assert results["grad_query"].abs().max() < 1e-4


def test_tokens_by_heads_in_memory(gpu):
    inputs, cotangents = case(sizes={"B": 2, "H": 3})
    expected = gpu.run(inputs, cotangents)
    actual = gpu.run(Inputs(*(packed(tensor) for tensor in inputs)), cotangents)
    assert_equal(actual, expected)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_offsets_beyond_32_bits(gpu, dim, tmp_path):
    inputs, cotangents = case(lengths=(7, 9), sizes={"B": 2})
    mask = torch.randn(2, 2, 1, 9)
    expected = gpu.run(inputs, cotangents, attn_mask=mask)
    far = Inputs(*(far_apart(x, dim, tmp_path / f"{i}") for i, x in enumerate(inputs)))
    far_mask = far_apart(mask, 3 if dim == 2 else dim, tmp_path / "mask")
    assert_equal(gpu.run(far, cotangents, attn_mask=far_mask), expected)


def test_mask_of_every_other_entry(gpu):
    inputs, cotangents = case(sizes={"B": 2})
    mask = (torch.rand(2, 1, 1, 180) > 0.4)[..., ::2]
    check(gpu, inputs, cotangents, attn_mask=mask)


def test_row_state_makes_the_map(gpu):
    """a = 2^(s - origin) * inverse_sum; the correction is sum_j a_j (s_j - t_j) from there."""
    inputs, _ = case()
    results = gpu.forward(inputs)
    origin, inverse_sum, correction = results["row_state"].double()[..., None]
    query, key, _, teacher_query, teacher_key = (x.double() / 32**0.25 for x in inputs)
    s = query @ key.transpose(-1, -2) - origin * math.log(2)
    t = teacher_query @ teacher_key.transpose(-1, -2) - lse_of_teacher(inputs)[..., None]
    attention = s.exp() * inverse_sum
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 2, 70).double(), rtol=0, atol=1e-6)
    expected = (attention * (s - t)).sum(-1, keepdim=True)
    torch.testing.assert_close(correction, expected, rtol=1e-5, atol=1e-5)
