"""Records moved to another grid against teacher maps that are written out and moved themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from attn_kd import attention_kl
from attn_kd.distill.alignment import (
    check_grid,
    deduced_grid,
    group_tokens,
    grouped_record,
    resample_tokens,
    resampled_record,
)
from attn_kd.errors import InputError
from attn_kd.nn.taps import AttentionRecord

B, H, D, DT = 2, 3, 4, 5


def triangle_weights(size: int, target: int) -> Tensor:
    """Return the [target, size] matrix of antialiased linear interpolation, from its definition.

    Pixel i covers [i, i + 1). A target pixel's weights fall linearly from its centre, over one of
    its own widths where it is the wider, and sum to 1.
    """
    step = size / target
    reach = max(step, 1.0)
    weights = torch.tensor(
        [
            [max(0.0, 1.0 - abs(i + 0.5 - (j + 0.5) * step) / reach) for i in range(size)]
            for j in range(target)
        ],
        dtype=torch.float64,
    )
    return weights / weights.sum(1, keepdim=True)


def resampling_matrix(grid, target) -> Tensor:
    """Return R [m, n] of the module's docstring."""
    return torch.kron(*(triangle_weights(n, m) for n, m in zip(grid, target, strict=True)))


def membership(grid, target) -> Tensor:
    """Return a bool [m, n]: which teacher tokens lie in the block of each student token."""
    coarse = (1,) * (len(grid) - len(target)) + tuple(target)
    blocks = [n // m for n, m in zip(grid, coarse, strict=True)]
    students = list(itertools.product(*map(range, coarse)))
    member = torch.zeros(len(students), math.prod(grid), dtype=torch.bool)
    for token, position in enumerate(itertools.product(*map(range, grid))):
        block = tuple(x // size for x, size in zip(position, blocks, strict=True))
        member[students.index(block), token] = True
    return member


def case(grid, target, *, queries=None, seed=0):
    """Return a student's (query, key, value) with gradient and a teacher's record, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens, dim):
        return torch.randn(B, H, tokens, dim, generator=generator, dtype=torch.float64) * 1.5

    m, n = math.prod(target), math.prod(grid)
    student = [draw(queries or m, D), draw(m, D), draw(m, D)]
    record = AttentionRecord(draw(queries or n, DT), draw(n, DT), torch.zeros(()), 0.5)
    return [tensor.requires_grad_() for tensor in student], record


def padding(target) -> Tensor:
    """Return a key padding mask [B, 1, 1, m] that hides the last student token of one image."""
    mask = torch.ones(B, 1, 1, math.prod(target), dtype=torch.bool)
    mask[1, ..., -1] = False
    return mask


def explicit(student, teacher_logits, mask, divergence):
    """Return the divergence of every row from whole maps, and the attention output."""
    query, key, value = student
    # Finite, so that gradients are; its exponential is 0.
    log_a, log_b = (
        logits.masked_fill(~mask, -1e9).log_softmax(-1)
        for logits in (D**-0.5 * query @ key.mT, teacher_logits)
    )
    output = log_a.exp() @ value
    if divergence == "mse":
        return (log_a.exp() - log_b.exp()).square().sum(-1), output
    sign = 1 if divergence == "reverse_kl" else -1
    weights = (log_a if divergence == "reverse_kl" else log_b).exp()
    return sign * (weights * (log_a - log_b).masked_fill(~mask, 0.0)).sum(-1), output


def assert_equal_with_gradients(student, record, teacher_logits, mask, divergence="reverse_kl"):
    actual = attention_kl(
        *student,
        record.query,
        record.key,
        teacher_lse=record.lse,
        teacher_scale=record.scale,
        attn_mask=mask,
        divergence=divergence,
    )
    expected, output = explicit(student, teacher_logits, mask, divergence)
    torch.testing.assert_close(actual.kl, expected)
    weights = torch.rand(expected.shape, dtype=torch.float64)
    losses = (
        (weights * kl).sum() + out.square().sum()
        for kl, out in ((actual.kl, actual.output), (expected, output))
    )
    gradients = [torch.autograd.grad(loss, student) for loss in losses]
    torch.testing.assert_close(*gradients)


RESAMPLED = [
    pytest.param((6, 4), (3, 4), id="coarser"),
    pytest.param((2, 3), (4, 5), id="finer"),
    pytest.param((5, 2), (2, 5), id="both"),
    pytest.param((6, 9), (2, 3), id="by-3"),
]


@pytest.mark.parametrize(("grid", "target"), RESAMPLED)
def test_resampled_logits_are_interpolated_logits(grid, target):
    student, record = case(grid, target)
    r = resampling_matrix(grid, target)
    logits = r @ (record.scale * record.query @ record.key.mT) @ r.T
    record = resampled_record(record, grid, target, queries_are_tokens=True)
    assert_equal_with_gradients(student, record, logits, padding(target))


def test_resampled_keys_of_cross_attention():
    grid, target = (6, 4), (3, 2)
    student, record = case(grid, target, queries=7)
    logits = record.scale * record.query @ record.key.mT @ resampling_matrix(grid, target).T
    record = resampled_record(record, grid, target, queries_are_tokens=False)
    assert_equal_with_gradients(student, record, logits, padding(target))


def visible_part(grid) -> Tensor:
    """Return a teacher's padding mask [B, 1, 1, n]: one image whole, one without its border."""
    seen = torch.ones(B, *grid, dtype=torch.bool)
    seen[1, grid[0] - grid[0] // 3 :] = False
    seen[1, :, grid[1] // 2 + 1 :] = False
    return seen.flatten(1)[:, None, None]


def renormalised(r, seen) -> Tensor:
    """Return R' [B, 1, m, n] of the module's docstring; rows that see nothing are 0."""
    r = r * seen.double()
    return r / r.sum(-1, keepdim=True).where(r.any(-1, keepdim=True), 1.0)


@pytest.mark.parametrize("queries_are_tokens", [True, False], ids=["self", "cross"])
@pytest.mark.parametrize(("grid", "target"), RESAMPLED)
def test_padding_of_the_teacher_is_left_out_of_the_interpolation(grid, target, queries_are_tokens):
    student, record = case(grid, target, queries=None if queries_are_tokens else 7)
    seen = visible_part(grid)
    r = renormalised(resampling_matrix(grid, target), seen)
    logits = record.scale * record.query @ record.key.mT @ r.mT
    logits = r @ logits if queries_are_tokens else logits
    record = record._replace(attn_mask=seen, mask_known=True)
    record = resampled_record(record, grid, target, queries_are_tokens=queries_are_tokens)
    assert_equal_with_gradients(student, record, logits, r.any(-1)[:, :, None])


@pytest.mark.parametrize("held", [0.0, 1e4, float("nan")])
def test_what_padding_holds_does_not_matter_to_resampling(held):
    grid, target = (6, 9), (4, 4)
    _, record = case(grid, target)
    seen = visible_part(grid)
    record = record._replace(attn_mask=seen, mask_known=True)
    hidden = ~seen.transpose(2, 3)
    other = record._replace(
        query=record.query.masked_fill(hidden, held), key=record.key.masked_fill(hidden, held)
    )
    expected, actual = (
        resampled_record(one, grid, target, queries_are_tokens=True) for one in (record, other)
    )
    assert torch.equal(actual.query, expected.query)
    assert torch.equal(actual.key, expected.key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resampling_out_of_reach_of_padding_is_that_of_whole_images_to_the_bit(dtype):
    grid, target = (7, 10), (3, 7)
    tokens = torch.randn(B, H, 70, D).to(dtype)
    seen = visible_part(grid)
    whole = resample_tokens(tokens, grid, target)
    actual = resample_tokens(tokens, grid, target, seen.transpose(2, 3))
    assert torch.equal(actual[0], whole[0])
    untouched = ~(resampling_matrix(grid, target) @ (~seen[1, 0, 0]).double()).bool()
    assert 0 < untouched.sum() < 21
    assert torch.equal(actual[1][:, untouched], whole[1][:, untouched])
    assert not torch.equal(actual[1], whole[1])


def test_resampling_under_a_mask_that_depends_on_the_query_leaves_out_keys_nobody_sees():
    grid, target = (4, 4), (2, 3)
    _, record = case(grid, target)
    seen = visible_part(grid)
    pairs = seen & torch.rand(B, 1, 16, 16).ge(0.5)
    pairs[:, :, 0] = seen[:, :, 0]
    expected, actual = (
        resampled_record(
            record._replace(attn_mask=mask, mask_known=True), grid, target, queries_are_tokens=True
        )
        for mask in (seen, pairs)
    )
    assert torch.equal(actual.query, expected.query)
    assert torch.equal(actual.key, expected.key)


GROUPED = [
    pytest.param((6, 4), (3, 4), id="rows"),
    pytest.param((4, 6), (2, 2), id="both-axes"),
    pytest.param((3, 2, 4), (2, 4), id="clip"),
    pytest.param((3, 4, 4), (2, 2), id="clip-and-axes"),
    pytest.param((4, 2, 2), (2, 2, 1), id="clip-against-clip"),
]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "mse"])
@pytest.mark.parametrize(("grid", "target"), GROUPED)
def test_grouped_keys_compare_the_mass_of_blocks(grid, target, divergence):
    student, record = case(grid, target)
    member = membership(grid, target).double()
    mean = member / member.sum(1, keepdim=True)
    exponentials = (mean @ (record.scale * record.query @ record.key.mT)).exp()
    logits = (exponentials @ member.T).log()
    record = grouped_record(record, grid, target, queries_are_tokens=True)
    assert_equal_with_gradients(student, record, logits, padding(target), divergence)


def test_grouped_keys_of_cross_attention_conserve_the_teachers_attention():
    grid, target = (2, 6, 4), (3, 2)
    student, record = case(grid, target, queries=7)
    whole = (record.scale * record.query @ record.key.mT).softmax(-1)
    mass = whole @ membership(grid, target).double().T
    torch.testing.assert_close(mass.sum(-1), torch.ones(B, H, 7, dtype=torch.float64))
    record = grouped_record(record, grid, target, queries_are_tokens=False)
    assert record.group == 8
    mask = torch.ones(B, 1, 1, 6, dtype=torch.bool)
    assert_equal_with_gradients(student, record, mass.log(), mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize("queries_are_tokens", [True, False], ids=["self", "cross"])
def test_padding_of_the_teacher_is_left_out_of_groups(queries_are_tokens, dtype):
    grid, target = (4, 4), (2, 2)
    student, record = case(grid, target, queries=None if queries_are_tokens else 7)
    seen = torch.zeros(B, 4, 4, dtype=torch.bool)
    seen[0, :3, :3] = True  # in part visible: three blocks
    seen[1, :, :2] = True  # of two blocks nothing is visible: the student must hide them
    seen = seen.flatten(1)[:, None, None, :]
    factors = {"query": record.query.to(dtype), "key": record.key.to(dtype)}
    record = record._replace(**factors, attn_mask=seen, mask_known=True)

    counts = membership(grid, target).double() * seen[:, :, 0, None, :]  # [B, 1, m, n]
    logits = record.scale * record.query.double() @ record.key.double().mT
    if queries_are_tokens:
        logits = counts / counts.sum(-1, keepdim=True).clamp(min=1) @ logits
    logits = (logits.exp() @ counts.mT).log()
    mask = torch.ones(B, 1, 1, 4, dtype=torch.bool)
    mask[1, ..., 1::2] = False
    logits = logits.masked_fill(~mask, 0.0)
    record = grouped_record(record, grid, target, queries_are_tokens=queries_are_tokens)
    if queries_are_tokens:  # the explicit map gives these rows no teacher
        student[0] = student[0].detach()
    kl = attention_kl(
        *student, record.query, record.key, teacher_scale=record.scale, attn_mask=mask
    ).kl
    expected, _ = explicit(student, logits, mask, "reverse_kl")
    rows = mask[:, :, 0] if queries_are_tokens else torch.ones(B, 1, 7, dtype=torch.bool)
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {}
    tolerance = tolerance or {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(
        kl.masked_fill(~rows, 0.0), expected.masked_fill(~rows, 0.0), **tolerance
    )


def test_padded_groups_keep_the_default_scale_of_the_teacher():
    # The padding adds a feature, of which the default would otherwise take account.
    _, record = case((4, 4), (2, 2))
    seen = torch.ones(B, 1, 1, 16, dtype=torch.bool)
    seen[..., 12:] = False
    record = record._replace(attn_mask=seen, mask_known=True)
    default, given = (
        grouped_record(record._replace(scale=scale), (4, 4), (2, 2), queries_are_tokens=True)
        for scale in (None, DT**-0.5)
    )
    assert default.key.shape[-1] == DT + 1
    assert default.scale == given.scale == DT**-0.5


def test_grouping_under_a_mask_that_depends_on_the_query_is_refused():
    _, record = case((4, 4), (2, 2))
    record = record._replace(attn_mask=torch.ones(16, 16).tril().bool(), mask_known=True)
    with pytest.raises(InputError, match=r"\(16, 16\) has a row for every query"):
        grouped_record(record, (4, 4), (2, 2), queries_are_tokens=True)


@pytest.mark.parametrize("align", [resampled_record, grouped_record])
def test_record_of_a_bfloat16_teacher_is_as_good_as_its_numbers(align):
    grid, target = (4, 6), (2, 2)
    student, record = case(grid, target)
    rounded = record._replace(query=record.query.bfloat16(), key=record.key.bfloat16())
    exact = record._replace(query=rounded.query.double(), key=rounded.key.double())
    kls = []
    for one in (exact, rounded):
        one = align(one, grid, target, queries_are_tokens=True)
        kls.append(attention_kl(*student, one.query, one.key, teacher_scale=one.scale).kl)
    torch.testing.assert_close(kls[1], kls[0], rtol=1e-5, atol=1e-5)


def test_group_tokens_by_hand():
    tokens = torch.arange(2 * 4.0).reshape(1, 1, 8, 1)
    # 0 1 | 2 3
    # 4 5 | 6 7
    expected = [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    assert group_tokens(tokens, (2, 4), (1, 2))[0, 0, :, :, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_resampling_is_done_in_float32_at_least(dtype):
    tokens = torch.randn(1, 2, 12, 3, dtype=torch.float64).to(dtype)
    actual = resample_tokens(tokens, (3, 4), (2, 2))
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    expected = resampling_matrix((3, 4), (2, 2)) @ tokens.double()
    tolerance = 1e-6 if actual.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("grid", "target"),
    [((6, 4), (4, 4)), ((3, 4, 4), (2, 3)), ((4, 4), (8, 8)), ((4, 4), (1, 2, 2))],
    ids=["rows", "columns-of-a-clip", "finer", "student-has-the-time"],
)
def test_grid_that_does_not_divide_is_refused(grid, target):
    with pytest.raises(InputError, match=r"expected one that divides .*resample"):
        group_tokens(torch.zeros(1, 1, math.prod(grid), 1), grid, target)


def test_resampling_a_clip_is_refused():
    with pytest.raises(InputError, match=r"no time axis: the grids are \(3, 2, 2\) and \(2, 2\)"):
        resample_tokens(torch.zeros(1, 1, 12, 1), (3, 2, 2), (2, 2))


@pytest.mark.parametrize(
    ("tokens", "image", "grid"),
    [
        pytest.param(169, (416, 416), (13, 13), id="stride-32"),
        pytest.param(25 * 34, (800, 1066), (25, 34), id="rounded-up"),
        pytest.param(50 * 66, (800, 1066), (50, 66), id="rounded-down"),
        pytest.param(37 * 37, (518, 518), (37, 37), id="patches-of-14"),
        pytest.param(24, (4, 6), (4, 6), id="feature-maps"),
        pytest.param(197, (224, 224), None, id="class-token"),
        pytest.param(16, None, None, id="no-image"),
    ],
)
def test_deduced_grid(tokens, image, grid):
    assert deduced_grid(tokens, image) == grid


@pytest.mark.parametrize("grid", [(4,), (4, 0), (1, 2, 3, 4), (2.0, 2), "44", 4])
def test_grid_that_is_none_is_refused(grid):
    with pytest.raises(InputError, match="teacher_grid="):
        check_grid("teacher_grid", grid)
