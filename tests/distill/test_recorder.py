"""A teacher's pass recorded apart from the student's, as a cache of it is used."""

from __future__ import annotations

import pytest
import torch

from attn_kd.distill import AttentionDistiller, TeacherPass, TeacherRecorder, distillation_loss
from attn_kd.distill.recorder import image_size
from attn_kd.errors import InputError
from tests.tiny_detr import tiny_batch, tiny_detr

ENCODER_0 = "model.encoder.layers.0.self_attn"
ENCODER_1 = "model.encoder.layers.1.self_attn"


@pytest.fixture
def teacher():
    return tiny_detr(seed=1)


@pytest.fixture
def student():
    return tiny_detr(seed=2, encoder_layers=1)


def recorded(teacher, batch):
    with TeacherRecorder(teacher, [ENCODER_1]) as recorder:
        return recorder({name: value for name, value in batch.items() if name != "labels"})


def test_recorded_pass_trains_as_the_teacher_itself(teacher, student):
    batch = tiny_batch(labels=True)
    given = recorded(teacher, batch)
    with AttentionDistiller(teacher, student) as distiller:
        results = distiller(**batch), distiller.run(batch, teacher_pass=given)
    expected, actual = (
        distillation_loss(result, alpha=0.7, class_weight=1.0).total for result in results
    )
    assert actual == expected


def test_teacher_is_not_run_beside_a_given_pass(teacher, student):
    given = TeacherPass(recorded(teacher, tiny_batch()).records)
    with AttentionDistiller(teacher, student) as distiller:
        expected = distiller(**tiny_batch()).attention_kl
        teacher.register_forward_hook(lambda *_: 1 / 0)
        result = distiller.run(tiny_batch(), teacher_pass=given)
    assert result.attention_kl == expected
    assert result.teacher is None


def test_records_without_lse_are_completed_under_the_students_mask(teacher, student):
    given = recorded(teacher, tiny_batch()).without_lse()
    assert all(record.lse is None for record in given.records.values())
    with AttentionDistiller(teacher, student) as distiller:
        expected = distiller(**tiny_batch()).attention_kl
        actual = distiller.run(tiny_batch(), teacher_pass=given).attention_kl
    torch.testing.assert_close(actual, expected)


def test_missing_layer_of_a_given_pass_is_named(teacher, student):
    with (
        AttentionDistiller(teacher, student) as distiller,
        pytest.raises(InputError, match=rf"no record of layer '{ENCODER_1}'; it has none"),
    ):
        distiller.run(tiny_batch(), teacher_pass=TeacherPass({}))


def test_inputs_and_a_pass_cannot_both_be_given(teacher, student):
    given = recorded(teacher, tiny_batch())
    with (
        AttentionDistiller(teacher, student) as distiller,
        pytest.raises(InputError, match="both given"),
    ):
        distiller.run(tiny_batch(), teacher_inputs=tiny_batch(), teacher_pass=given)


def test_recorder_names_a_wrong_path(teacher):
    with pytest.raises(InputError, match=rf"teacher has no layer .*did you mean '{ENCODER_0}"):
        TeacherRecorder(teacher, ["encoder.layers.0.self_attn"])


def test_closed_recorder_leaves_the_teacher_as_it_was(teacher):
    teacher.train()
    with TeacherRecorder(teacher, [ENCODER_0]):
        assert not teacher.training
        assert teacher.config._attn_implementation == "attn_kd"
    assert teacher.training
    assert teacher.config._attn_implementation == "sdpa"


IMAGES = torch.zeros(2, 3, 64, 48)


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        pytest.param({"pixel_values": IMAGES, "other": IMAGES}, (64, 48), id="pixel-values"),
        pytest.param({"images": IMAGES, "mask": IMAGES.bool()}, (64, 48), id="another-name"),
        pytest.param({"first": IMAGES, "second": IMAGES}, None, id="ambiguous"),
        pytest.param({"pixel_values": IMAGES[:, None], "maps": IMAGES}, None, id="clips"),
        pytest.param({"tokens": torch.zeros(2, 64, 48)}, None, id="no-images"),
    ],
)
def test_size_of_the_images_among_inputs(inputs, size):
    assert image_size(inputs) == size
