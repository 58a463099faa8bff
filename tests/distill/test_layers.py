"""Pairing of layers: the default, and what is said about wrong paths."""

from __future__ import annotations

import pytest

from attn_kd.distill.layers import pair_layers
from attn_kd.errors import InputError
from tests.tiny_detr import tiny_detr

GOOD = "model.encoder.layers.0.self_attn"


@pytest.fixture(scope="module")
def models():
    return tiny_detr(encoder_layers=1), tiny_detr(encoder_layers=3)


def test_default_pairs_the_final_encoder_layers(models):
    student, teacher = models
    (pair,) = pair_layers(student, teacher, None)
    assert pair.student_path == "model.encoder.layers.0.self_attn"
    assert pair.teacher_path == "model.encoder.layers.2.self_attn"
    assert pair.student is student.model.encoder.layers[0].self_attn
    assert pair.teacher is teacher.model.encoder.layers[2].self_attn
    assert pair.self_attention


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param(
            {"model.encoder.layers.7.self_attn": GOOD},
            "student has no layer 'model.encoder.layers.7.self_attn'; did you mean '" + GOOD,
            id="no-such-student-layer",
        ),
        pytest.param(
            {GOOD: "encoder.layers.2.self_attn"},
            "teacher has no layer 'encoder.layers.2.self_attn'; did you mean .*layers.2.self_attn'",
            id="no-such-teacher-layer",
        ),
        pytest.param(
            {GOOD: "model.encoder.layers.1"},
            "'model.encoder.layers.1' is a DetrEncoderLayer, not an attention module; did you mean "
            "'model.encoder.layers.1.self_attn'",
            id="not-an-attention-module",
        ),
        pytest.param(
            {"zzz": GOOD},
            "no layer 'zzz'; its attention modules are 'model.encoder.layers.0.self_attn'",
            id="nothing-near",
        ),
        pytest.param(
            {GOOD: "model.decoder.layers.0.encoder_attn"},
            "is self-attention, teacher layer .* is cross-attention",
            id="kinds-differ",
        ),
        pytest.param({}, "pairs no layers", id="empty"),
    ],
)
def test_wrong_layers_are_explained(models, layers, message):
    with pytest.raises(InputError, match=message):
        pair_layers(*models, layers)
