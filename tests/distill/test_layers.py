"""Pairing of layers: the default, and what is said about wrong paths."""

from __future__ import annotations

import pytest

from attn_kd.distill.layers import depth_map, pair_layers
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
            "'model.encoder.layers.1' is a DetrEncoderLayer, not an attention module.*did you mean "
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
            "is encoder self-attention, teacher layer .* is decoder cross-attention",
            id="kinds-differ",
        ),
        pytest.param({}, "pairs no layers", id="empty"),
        pytest.param([GOOD], r"layers=\['model.*'\]; expected one of last, all, or", id="list"),
        pytest.param(-1, "layers=-1; expected one of last, all, or", id="number"),
        pytest.param({GOOD: 1}, "layers=.*: 1}; expected .* a mapping of strings", id="index"),
    ],
)
def test_wrong_layers_are_explained(models, layers, message):
    with pytest.raises(InputError, match=message):
        pair_layers(*models, layers)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (1, 6, [5]),
        (2, 6, [2, 5]),
        (3, 6, [1, 3, 5]),
        (4, 6, [0, 2, 3, 5]),
        (3, 3, [0, 1, 2]),
        (3, 2, [0, 0, 1]),
        (6, 1, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_depth_map(student, teacher, expected):
    assert depth_map(student, teacher) == expected


@pytest.mark.parametrize("student", range(1, 8))
@pytest.mark.parametrize("teacher", range(1, 8))
def test_depth_map_is_monotonic_and_ends_at_the_last_layer(student, teacher):
    mapped = depth_map(student, teacher)
    assert mapped == sorted(mapped)
    assert (len(mapped), mapped[-1]) == (student, teacher - 1)
    assert len(set(mapped)) == min(student, teacher)


ENCODER = "model.encoder.layers.{}.self_attn"
DECODER = "model.decoder.layers.{}.self_attn"
CROSS = "model.decoder.layers.{}.encoder_attn"


@pytest.mark.parametrize(
    ("layers", "kinds", "expected"),
    [
        pytest.param("last", ["encoder_self"], {ENCODER.format(1): ENCODER.format(3)}, id="last"),
        pytest.param(
            "all",
            ["encoder_self"],
            {ENCODER.format(0): ENCODER.format(1), ENCODER.format(1): ENCODER.format(3)},
            id="all",
        ),
        pytest.param(
            "last",
            ["decoder_cross", "decoder_self"],
            {CROSS.format(0): CROSS.format(2), DECODER.format(0): DECODER.format(2)},
            id="last-of-two-kinds",
        ),
    ],
)
def test_layers_selected_by_name(layers, kinds, expected):
    student = tiny_detr(encoder_layers=2, decoder_layers=1)
    teacher = tiny_detr(encoder_layers=4, decoder_layers=3)
    pairs = pair_layers(student, teacher, layers, kinds)
    assert {pair.student_path: pair.teacher_path for pair in pairs} == expected


@pytest.mark.parametrize(
    ("layers", "kinds", "message"),
    [
        pytest.param("first", ["encoder_self"], "'first' is no selection.*last, all", id="layers"),
        pytest.param("all", ["encoder"], "'encoder' is no kind.*encoder_self", id="kind"),
        pytest.param("all", [], "expected a sequence", id="no-kind"),
        pytest.param("all", "encoder_self", "expected a sequence", id="kind-not-in-a-sequence"),
    ],
)
def test_wrong_selection_is_explained(models, layers, kinds, message):
    with pytest.raises(InputError, match=message):
        pair_layers(*models, layers, kinds)


def test_model_without_a_layer_of_the_kind_lists_what_it_has(models):
    encoder = models[0].model.encoder
    decoder = models[0].model.decoder
    with pytest.raises(InputError, match=r"DetrDecoder has no encoder self.*'layers\.0\.self_"):
        pair_layers(decoder, encoder, "last")
