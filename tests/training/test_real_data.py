"""A few steps on real ultrasound: sizes, modes and counts of objects as they come."""

import math

import pytest

from attn_kd.training import (
    TrainingConfig,
    TrainingData,
    detection_metrics,
    distill_detector,
    train_detector,
)

pytestmark = pytest.mark.data


@pytest.mark.parametrize(
    ("name", "classes", "queries"),
    [
        ("carotid", ["carotid"], 1),  # exactly one object an image
        ("nerve_block", ["nerve", "vessel"], None),
    ],
)
def test_teacher_and_student_train_and_can_be_measured(real_data, tmp_path, name, classes, queries):
    data = TrainingData.open(real_data / name)
    config = TrainingConfig(
        encoder_layers=2, decoder_layers=1, max_steps=2, batch_size=4, log_steps=1
    )
    teacher = train_detector(config, data, tmp_path / "teacher", device="cpu")
    student = distill_detector(
        config.replace(encoder_layers=1), teacher.folder, data, tmp_path / "student", device="cpu"
    )
    assert list(student.model.config.id2label.values()) == classes
    if queries is not None:
        assert student.model.config.num_queries == queries
    assert all(math.isfinite(entry["attention_kl"]) for entry in student.history)
    if name == "nerve_block":  # forty images; carotid's take ten times as long
        metrics = detection_metrics(student.model, student.processor, data.val)
        assert 0 <= metrics["mAP50"] <= 1
