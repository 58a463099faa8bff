"""The training steps that are timed: all ways of distilling train the same student alike."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from bench.bench_training import ExactStep
from bench.detr import SETTINGS, WAYS, TrainingStep, make_batch

NAME = "detr-tiny-128"


@pytest.fixture(scope="module")
def exact() -> ExactStep:
    return ExactStep(SETTINGS[NAME])


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_float64(way, exact):
    step = TrainingStep(way, SETTINGS[NAME])
    errors = exact.check(step, step(make_batch(SETTINGS[NAME])))
    assert ("map gradient" in errors) == (way in ("attn_kd", "eager"))


def test_a_step_without_distillation_has_another_gradient(exact):
    step = TrainingStep("teacher", SETTINGS[NAME])
    losses = step(make_batch(SETTINGS[NAME]))
    with pytest.raises(AssertionError, match=r"map gradient is .* off"):
        exact.check(step, losses._replace(attention_kl=exact.losses.attention_kl))


@pytest.mark.parametrize("way", ["none", "attn_kd"])
def test_a_step_changes_the_student_but_not_its_backbone(way):
    step = TrainingStep(way, SETTINGS[NAME])
    before = {name: tensor.clone() for name, tensor in step.student.state_dict().items()}
    step(make_batch(SETTINGS[NAME]))
    changed = {n for n, tensor in step.student.state_dict().items() if (tensor != before[n]).any()}
    assert changed
    assert not any(name.startswith("model.backbone") for name in changed)
