"""The taps' bookkeeping: which rows count, what is recorded, what is refused."""

from __future__ import annotations

import pytest
import torch

from attn_kd import attention_kl
from attn_kd.errors import InputError
from attn_kd.nn.taps import (
    AttentionRecord,
    AttentionTaps,
    FuseTap,
    RecordTap,
    distilled_rows,
    mean_divergence,
)

B, H, L, D = 2, 3, 5, 4
KEYS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)  # [B, Lk]


def additive(mask: torch.Tensor, masked: float) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, masked)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(KEYS[:, None, None, :], id="bool"),
        pytest.param(KEYS[:, None, None, :].expand(B, H, L, L), id="expanded"),
        pytest.param(additive(KEYS[:, None, None, :], float("-inf")), id="minus-infinity"),
        pytest.param(additive(KEYS[:, None, None, :], torch.finfo().min), id="lowest-float"),
        pytest.param(additive(KEYS[:, None, None, :], -1e9), id="minus-1e9"),
        pytest.param(additive(KEYS[:, None, None, :], -65504).half(), id="lowest-float16"),
    ],
)
def test_padded_queries_of_self_attention_do_not_count(mask):
    rows = distilled_rows(mask, self_attention=True)
    assert torch.equal(rows.expand(B, H, L), KEYS[:, None, :].expand(B, H, L))


def test_queries_of_cross_attention_all_count():
    rows = distilled_rows(KEYS[:, None, None, :], self_attention=False)
    assert rows.expand(B, H, 7).all()


def test_a_query_that_sees_no_key_does_not_count():
    mask = torch.ones(L, L, dtype=torch.bool)
    mask[2] = False
    rows = distilled_rows(mask, self_attention=False)
    assert rows.expand(B, H, L)[0, 0].tolist() == [True, True, False, True, True]


def test_causal_mask_leaves_every_row():
    rows = distilled_rows(torch.ones(L, L).tril().bool(), self_attention=True)
    assert rows.all()


def test_mean_divergence_is_one_mean_over_the_rows_of_the_batch():
    kl = torch.rand(B, H, L, dtype=torch.float64)
    rows = distilled_rows(KEYS[:, None, None, :], self_attention=True)
    expected = torch.cat([kl[0].flatten(), kl[1, :, :3].flatten()]).mean()
    torch.testing.assert_close(mean_divergence(kl, rows), expected)


def test_mean_divergence_ignores_what_stands_in_other_rows():
    kl = torch.ones(B, H, L)
    kl[1, :, 3:] = float("nan")
    rows = distilled_rows(KEYS[:, None, None, :], self_attention=True)
    assert mean_divergence(kl, rows) == 1.0


def test_mean_divergence_of_head_averaged_maps():
    kl = torch.tensor([[1.0, 1, 1, 1, 1], [3, 3, 3, 9, 9]])
    rows = distilled_rows(KEYS[:, None, None, :], self_attention=True)
    assert mean_divergence(kl, rows) == (5 * 1.0 + 3 * 3.0) / 8


def test_mean_divergence_without_rows_is_zero():
    rows = torch.zeros(B, 1, L, dtype=torch.bool)
    assert mean_divergence(torch.ones(B, H, L), rows) == 0.0


def attend(tap, *, length=L, heads=H, batch=B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, D)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    return tap.attend(query.requires_grad_(), key, value, attn_mask=None, scale=None)


def fuse_tap(record):
    return FuseTap(
        record,
        layer="student.attn",
        teacher_layer="teacher.attn",
        self_attention=True,
        divergence="reverse_kl",
        head_reduction="none",
    )


@pytest.fixture
def record():
    tap = RecordTap("teacher.attn")
    attend(tap)
    return tap.record


def test_record_holds_no_graph_and_no_map(record):
    assert not any(tensor.requires_grad for tensor in record[:3])
    assert max(tensor.numel() for tensor in record[:3]) == B * H * L * D


def test_record_under_autocast_keeps_the_dtype_its_lse_belongs_to():
    tap = RecordTap("teacher.attn")
    with torch.autocast("cpu", torch.bfloat16):
        attend(tap)
    assert tap.record.query.dtype == tap.record.key.dtype == torch.bfloat16
    logits = tap.record.query.float() @ tap.record.key.float().mT * D**-0.5
    torch.testing.assert_close(tap.record.lse, logits.logsumexp(-1))


def test_equal_student_has_no_divergence(record):
    tap = fuse_tap(record)
    attend(tap)
    torch.testing.assert_close(tap.kl, torch.zeros(B, H, L), atol=1e-6, rtol=0)


def test_closed_tap_keeps_its_result(record):
    tap = fuse_tap(record)
    attend(tap, seed=1)
    tap.close()
    kept = tap.kl
    attend(tap, seed=2)
    assert tap.kl is kept


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param({"length": 7}, "from 7 to 7 tokens.*'teacher.attn' from 5 to 5", id="grid"),
        pytest.param({"heads": 2}, "'student.attn' has 2 heads.*'teacher.attn' has 3", id="heads"),
        pytest.param({"batch": 1}, "teacher ran on 2 images, the student on 1", id="batch"),
    ],
)
def test_maps_that_cannot_be_compared_are_named(record, sizes, message):
    with pytest.raises(InputError, match=message):
        attend(fuse_tap(record), **sizes)


def test_cross_attention_that_passes_for_self_attention_is_named(record):
    tap, tokens = fuse_tap(record), [torch.randn(B, H, n, D) for n in (L, L + 1, L + 1)]
    with pytest.raises(InputError, match=r"'student.attn' passes .* from 5 to 6 tokens"):
        tap.attend(*tokens, attn_mask=None, scale=None)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_layer_that_runs_twice_is_refused(record, role):
    tap = RecordTap("shared.attn") if role == "teacher" else fuse_tap(record)
    attend(tap)
    with pytest.raises(InputError, match="more than once"):
        attend(tap)


def test_taps_are_found_by_the_module_itself():
    first, second, third = (torch.nn.Linear(1, 1) for _ in range(3))
    tap = RecordTap("first")
    taps = AttentionTaps([(first, tap), (second, RecordTap("second"))], untapped="sdpa")
    assert taps.find(first) is tap
    assert taps.find(third) is None


PADDING = KEYS[:, None, None, :]


@pytest.mark.parametrize(
    ("teacher_mask", "student_mask"),
    [
        pytest.param(None, PADDING, id="student-alone"),
        pytest.param(PADDING, None, id="teacher-alone"),
        pytest.param(PADDING, PADDING.flip(0), id="another"),
        pytest.param(PADDING, PADDING.clone(), id="equal"),
        pytest.param(PADDING.expand(B, H, L, L), PADDING.expand(B, H, L, L), id="expanded"),
        pytest.param(PADDING, additive(PADDING, float("-inf")).double(), id="additive"),
    ],
)
def test_both_maps_are_taken_under_the_students_mask(teacher_mask, student_mask):
    student, teacher = torch.randn(2, 3, B, H, L, D, dtype=torch.float64)
    recording = RecordTap("teacher")
    recording.attend(*teacher, attn_mask=teacher_mask, scale=None)
    tap = FuseTap(
        recording.record,
        layer="student",
        teacher_layer="teacher",
        self_attention=True,
        divergence="reverse_kl",
        head_reduction="none",
    )
    tap.attend(*student, attn_mask=student_mask, scale=None)
    expected = attention_kl(*student, *teacher[:2], attn_mask=student_mask).kl
    torch.testing.assert_close(tap.kl, expected)


@pytest.mark.parametrize("other", ["same", "equal", "expanded"])
def test_log_sum_exp_is_kept_under_an_equal_mask(other):
    masks = {"same": PADDING, "equal": PADDING.clone(), "expanded": PADDING.expand(B, H, L, L)}
    tokens = torch.randn(B, H, L, D)
    tap = RecordTap("teacher")
    recorded = PADDING.clone().expand(B, H, L, L) if other == "expanded" else PADDING
    tap.attend(tokens, tokens, tokens, attn_mask=recorded, scale=None)
    assert tap.record.lse_under(masks[other]) is tap.record.lse


def test_log_sum_exp_of_a_record_without_a_mask_is_the_students():
    tokens, lse = torch.zeros(B, H, L, D), torch.zeros(B, H, L)
    assert AttentionRecord(tokens, tokens, lse, None).lse_under(PADDING) is lse
