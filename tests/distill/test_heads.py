"""Teacher and student with different numbers of heads: averaged maps, or a map of heads."""

from __future__ import annotations

import copy

import pytest
import torch

from attn_kd.distill import AttentionDistiller
from attn_kd.distill.heads import head_map_by_layer, mapped_heads
from attn_kd.errors import InputError
from attn_kd.nn.taps import AttentionRecord
from tests.distill.explicit import attention_map, explicit_kl, gradients
from tests.tiny_detr import tiny_batch, tiny_detr, token_mask

ENCODER_0 = "model.encoder.layers.0.self_attn"
ENCODER_1 = "model.encoder.layers.1.self_attn"
DECODER_SELF = "model.decoder.layers.0.self_attn"


@pytest.fixture
def teacher():
    return tiny_detr(seed=1, heads=8).double()


@pytest.fixture
def student():
    return tiny_detr(seed=2, encoder_layers=1).double()


def explicit_maps(student, teacher, batch, kind="encoder"):
    """Return the last maps of both, differentiable in (a copy of) the student."""
    student = copy.deepcopy(student)
    with torch.no_grad():
        teacher_map = attention_map(copy.deepcopy(teacher), batch, kind, -1)
    return student, attention_map(student, batch, kind, -1), teacher_map


def assert_same_with_gradients(result, student, expected, eager_student):
    torch.testing.assert_close(result.attention_kl, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradients(result.attention_kl, student),
        gradients(expected, eager_student),
        rtol=1e-5,
        atol=1e-9,
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_averaged_maps_of_different_head_counts(teacher, student, divergence):
    batch = tiny_batch(dtype=torch.float64)
    eager, *maps = explicit_maps(student, teacher, batch)
    averaged = [whole.mean(1, keepdim=True) for whole in maps]
    expected = explicit_kl(*averaged, rows=token_mask(batch), divergence=divergence)
    with AttentionDistiller(
        teacher, student, divergence=divergence, head_reduction="mean"
    ) as distiller:
        assert_same_with_gradients(distiller(**batch), student, expected, eager)


@pytest.mark.parametrize("heads", [[0, 2, 4, 6], [7, 7, 0, 1]], ids=["every-other", "repeated"])
def test_student_heads_learn_from_the_heads_they_are_mapped_to(teacher, student, heads):
    batch = tiny_batch(dtype=torch.float64)
    eager, student_map, teacher_map = explicit_maps(student, teacher, batch)
    expected = explicit_kl(student_map, teacher_map[:, heads], rows=token_mask(batch))
    with AttentionDistiller(teacher, student, head_map=heads) as distiller:
        assert_same_with_gradients(distiller(**batch), student, expected, eager)


def test_mapped_heads_of_a_teacher_with_inputs_of_its_own(teacher, student):
    # The teacher's log-sum-exp is not known then.
    batch = tiny_batch(dtype=torch.float64)
    inputs = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    with AttentionDistiller(teacher, student, head_map=[3, 2, 1, 0]) as distiller:
        expected = distiller(**batch).attention_kl
        actual = distiller.run(batch, teacher_inputs=inputs).attention_kl
    torch.testing.assert_close(actual, expected)


def test_masks_of_single_heads_are_mapped_with_them():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    mask = torch.rand(2, 3, 1, 7) < 0.5
    record = AttentionRecord(query, key, None, None, attn_mask=mask, mask_known=True)
    heads = [2, 0, 1, 0]
    mapped = mapped_heads(record, tuple(heads), torch.empty(2, 4, 5, 8), layer="layer")
    # Else a student with the teacher's mask would be taken to see what its teacher's heads see.
    assert torch.equal(mapped.attn_mask, mask[:, heads])
    shared = record._replace(attn_mask=mask[:, :1])
    mapped = mapped_heads(shared, tuple(heads), torch.empty(2, 4, 5, 8), layer="layer")
    assert torch.equal(mapped.attn_mask, mask[:, :1])


def test_head_map_of_one_layer_leaves_the_others_alone(student):
    teacher, batch = tiny_detr(seed=1).double(), tiny_batch(dtype=torch.float64)
    layers = {ENCODER_0: ENCODER_1, DECODER_SELF: DECODER_SELF}
    with AttentionDistiller(teacher, student, layers) as distiller:
        plain = distiller(**batch).attention_kl_per_layer
    with AttentionDistiller(teacher, student, layers, head_map={ENCODER_0: [3, 2, 1, 0]}) as mapped:
        actual = mapped(**batch).attention_kl_per_layer
    assert actual[DECODER_SELF] == plain[DECODER_SELF]
    assert actual[ENCODER_0] != plain[ENCODER_0]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([0, 1, 2], rf"for 3 heads, student layer '{ENCODER_0}' has 4"),
        ([0, 1, 2, 8], "names head 8, but .* heads 0 to 7"),
    ],
    ids=["too-few", "no-such-head"],
)
def test_head_map_that_does_not_fit_the_models(teacher, student, heads, message):
    with (
        AttentionDistiller(teacher, student, head_map=heads) as distiller,
        pytest.raises(InputError, match=message),
    ):
        distiller(**tiny_batch(dtype=torch.float64))


@pytest.mark.parametrize(
    ("head_map", "message"),
    [
        ([], "expected a teacher head, from 0, per student head"),
        ([-1, 0], "expected a teacher head"),
        ([0.5], "expected a teacher head"),
        ("01", "expected a teacher head"),
        (3, "expected a teacher head"),
        ({"b": [0]}, "names 'b', which is not distilled; .* 'a'"),
    ],
)
def test_head_map_that_is_none(head_map, message):
    with pytest.raises(InputError, match=message):
        head_map_by_layer(head_map, ["a"], "none")


def test_head_map_of_averaged_heads_is_refused():
    with pytest.raises(InputError, match="averages heads"):
        head_map_by_layer([0], ["a"], "mean")
