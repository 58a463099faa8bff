"""A distiller whose teacher sees more pixels, or another shape of grid, than its student."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from attn_kd.distill import AttentionDistiller, TeacherPass, TeacherRecorder
from attn_kd.distill.fitting import ModelGrid, PairFit
from attn_kd.distill.layers import LayerPair
from attn_kd.errors import InputError
from attn_kd.nn.taps import AttentionRecord
from tests.distill.explicit import explicit_kl, gradients
from tests.distill.test_alignment import membership, renormalised, resampling_matrix
from tests.tiny_detr import STRIDE, tiny_batch, tiny_detr, token_mask

ENCODER_0 = "model.encoder.layers.0.self_attn"
ENCODER_1 = "model.encoder.layers.1.self_attn"
CROSS = "model.decoder.layers.0.encoder_attn"
DECODER_SELF = "model.decoder.layers.0.self_attn"

GRID, TARGET = (16, 8), (8, 8)  # teacher's and student's tokens


@pytest.fixture
def teacher():
    return tiny_detr(seed=1).double()


@pytest.fixture
def student():
    return tiny_detr(seed=2, encoder_layers=1).double()


def images(grid, **options):
    """Return a batch whose encoder tokens form a grid."""
    batch = tiny_batch(dtype=torch.float64, **options)
    size = [n * STRIDE for n in grid]
    batch["pixel_values"] = F.interpolate(batch["pixel_values"], size)
    batch["pixel_mask"] = F.interpolate(batch["pixel_mask"][:, None].double(), size)[:, 0].long()
    return batch


def teacher_logits(teacher, batch, path, heads=4):
    """Return a layer's scaled logits [B, H, Lq, Lk] without a mask."""
    with TeacherRecorder(teacher, [path]) as recorder:
        record = recorder(batch).records[path]
    return record.query.shape[-1] ** -0.5 * record.query @ record.key.mT


def student_map(student, batch, kind):
    student.set_attn_implementation("eager")
    return student(**batch, output_attentions=True)[f"{kind}_attentions"][-1]


def expected_kl(student, logits, batch, kind):
    """Return the divergence from aligned teacher logits, under the student's mask."""
    visible = token_mask(batch)
    teacher_map = logits.masked_fill(~visible[:, None, None, :], -math.inf).softmax(-1)
    rows = visible if kind == "encoder" else None
    return explicit_kl(student_map(student, batch, kind), teacher_map, rows=rows)


def aligned(logits, alignment, visible, *, queries_are_tokens):
    """Return whole logits moved to the student's grid; visible [B, n]: the teacher's tokens."""
    if alignment == "resample":
        matrix = renormalised(resampling_matrix(GRID, TARGET), visible[:, None, None])
        logits = logits @ matrix.mT
        return matrix @ logits if queries_are_tokens else logits
    member = membership(GRID, TARGET).double()
    if queries_are_tokens:
        logits = (member / member.sum(1, keepdim=True)) @ logits
    return (logits.exp() @ member.T).log()


@pytest.mark.parametrize("alignment", ["resample", "group"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("layers", "kind"),
    [({ENCODER_0: ENCODER_1}, "encoder"), ({CROSS: CROSS}, "cross")],
    ids=["encoder", "cross"],
)
def test_teacher_of_a_finer_grid(teacher, student, layers, kind, padded, alignment):
    batch, fine = images(TARGET, padded=padded), images(GRID, padded=padded)
    (path,) = layers.values()
    logits = teacher_logits(teacher, fine, path)
    logits = aligned(logits, alignment, token_mask(fine), queries_are_tokens=kind == "encoder")
    eager = copy.deepcopy(student)
    expected = expected_kl(eager, logits, batch, kind)
    with AttentionDistiller(teacher, student, layers, alignment=alignment) as distiller:
        actual = distiller.run(batch, teacher_inputs=fine).attention_kl
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        found = gradients(actual, student)
    torch.testing.assert_close(found, gradients(expected, eager), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("alignment", ["resample", "group"])
@pytest.mark.parametrize("layers", [{ENCODER_0: ENCODER_1}, {CROSS: CROSS}], ids=["self", "cross"])
def test_what_the_teachers_padding_holds_does_not_matter(teacher, student, layers, alignment):
    """A cache has zeros there, a teacher in a padded batch what its layers make of padding."""
    batch, fine = images(TARGET, padded=True), images(GRID, padded=True)
    (path,) = layers.values()
    with TeacherRecorder(teacher, [path]) as recorder:
        given = recorder(fine)
    record = given.records[path]
    visible = token_mask(fine)[:, None, :, None]
    factors = {"key": record.key * visible}
    if path == ENCODER_1:
        factors["query"] = record.query * visible
    cut = TeacherPass({path: record._replace(**factors)}, given.output, given.image_size)
    with AttentionDistiller(teacher, student, layers, alignment=alignment) as distiller:
        expected = distiller.run(batch, teacher_inputs=fine).attention_kl
        actual = distiller.run(batch, teacher_pass=cut).attention_kl
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alignment", ["resample", "group"])
def test_alignment_of_equal_grids_changes_nothing(teacher, student, alignment):
    batch = images(TARGET)
    with AttentionDistiller(teacher, student) as distiller:
        expected = distiller(**batch).attention_kl
    with AttentionDistiller(teacher, student, alignment=alignment) as distiller:
        assert distiller(**batch).attention_kl == expected


def test_record_on_the_students_grid_keeps_its_lse():
    layer = torch.nn.Identity()
    pair = LayerPair("student", layer, "teacher", layer, "encoder_self")
    grids = [ModelGrid(role, (2, 3), None) for role in ("student", "teacher")]
    fit = PairFit(pair, "group", None, *grids)
    tokens, lse = torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6)
    record = AttentionRecord(tokens, tokens, lse, None)
    assert fit(record, tokens, tokens) is record


def test_decoder_self_attention_has_no_grid(teacher, student):
    layers = {DECODER_SELF: DECODER_SELF}
    with AttentionDistiller(teacher, student, layers) as distiller:
        expected = distiller.run(images(TARGET), teacher_inputs=images(GRID)).attention_kl
    with AttentionDistiller(
        teacher, student, layers, alignment="group", teacher_grid=(1, 1)
    ) as distiller:
        actual = distiller.run(images(TARGET), teacher_inputs=images(GRID)).attention_kl
    assert actual == expected


def test_recorded_pass_knows_its_image_size(teacher, student):
    batch, fine = images(TARGET), images(GRID)
    with AttentionDistiller(teacher, student, alignment="group") as distiller:
        expected = distiller.run(batch, teacher_inputs=fine).attention_kl
        with TeacherRecorder(teacher, [ENCODER_1]) as recorder:
            given = recorder(fine)
        assert distiller.run(batch, teacher_pass=given).attention_kl == expected


def test_grid_of_a_clip_is_given(teacher, student):
    # The teacher's 128 tokens as two frames of 8 x 8: the same keys in other groups.
    batch, fine = images(TARGET, padded=False), images(GRID, padded=False)
    logits = teacher_logits(teacher, fine, ENCODER_1)
    member = membership((2, 8, 8), TARGET).double()
    logits = ((0.5 * member @ logits).exp() @ member.T).log()
    expected = expected_kl(copy.deepcopy(student), logits, batch, "encoder")
    with AttentionDistiller(
        teacher, student, alignment="group", teacher_grid=(2, 8, 8)
    ) as distiller:
        actual = distiller.run(batch, teacher_inputs=fine).attention_kl
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_as_many_tokens_on_another_grid_are_refused(teacher, student):
    with (
        AttentionDistiller(teacher, student) as distiller,
        pytest.raises(InputError, match=r"a grid of \(4, 6\) tokens, .* one of \(6, 4\)"),
    ):
        distiller.run(images((4, 6)), teacher_inputs=images((6, 4)))


def test_grids_that_nobody_knows_are_compared_by_their_tokens(teacher, student):
    with AttentionDistiller(teacher, student) as distiller:
        with TeacherRecorder(teacher, [ENCODER_1]) as recorder:
            records = recorder(images((6, 4))).records
        given = TeacherPass(records).without_lse()
        assert distiller.run(images((4, 6)), teacher_pass=given).attention_kl > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"from 64 to 64 tokens, .* from 128 to 128.*alignment="),
        ({"alignment": "group", "teacher_grid": (8, 8)}, r"teacher_grid=\(8, 8\) has 64 tokens"),
        ({"alignment": "group", "student_grid": (4, 4)}, r"student_grid=\(4, 4\) has 16 tokens"),
        ({"alignment": "group", "student_grid": (64, 1)}, r"\(16, 8\), .* \(64, 1\).*divides"),
    ],
    ids=["none", "teacher-grid", "student-grid", "indivisible"],
)
def test_grids_that_do_not_fit_are_explained(teacher, student, options, message):
    with (
        AttentionDistiller(teacher, student, **options) as distiller,
        pytest.raises(InputError, match=message),
    ):
        distiller.run(images(TARGET), teacher_inputs=images(GRID))


def test_unknown_grid_must_be_given(teacher, student):
    with AttentionDistiller(teacher, student, alignment="resample") as distiller:
        with TeacherRecorder(teacher, [ENCODER_1]) as recorder:
            given = TeacherPass(recorder(images(GRID)).records)
        with pytest.raises(InputError, match=r"128 tokens of teacher .*teacher_grid=\(h, w\)"):
            distiller.run(images(TARGET), teacher_pass=given)


def test_class_tokens_have_no_place_on_a_grid():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = ViTConfig(num_hidden_layers=1, patch_size=8, image_size=32, **sizes)
    teacher, student = ViTModel(config), ViTModel(config)
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with AttentionDistiller(teacher, student) as distiller:
        assert distiller(**images).attention_kl > 0
    with (
        AttentionDistiller(teacher, student, alignment="resample") as distiller,
        pytest.raises(InputError, match=r"grid of the 17 tokens .* no class tokens"),
    ):
        distiller(**images)


def test_unknown_alignment_is_refused(teacher, student):
    with pytest.raises(InputError, match=r"'pool' is unknown; expected one of none, resample"):
        AttentionDistiller(teacher, student, alignment="pool")
