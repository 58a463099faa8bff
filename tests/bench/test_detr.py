"""The training steps that are timed: all ways of distilling train the same student alike."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from bench.accuracy import Errors
from bench.bench_training import ExactStep, check_in_autocast
from bench.detr import GPU_SETTINGS, SETTINGS, WAYS, TrainingStep, build_student, make_batch
from bench.workloads import SHAPES

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


def test_steps_in_autocast_are_those_of_float64_but_for_rounding():
    errors = Errors()
    check_in_autocast(SETTINGS[NAME]._replace(batch=1), "cpu", errors)
    assert errors.keys() == set(WAYS)
    assert all(1e-5 < errors[way]["map gradient"] < 0.1 for way in ("attn_kd", "eager"))


def test_a_dilated_last_stage_has_four_times_the_tokens():
    plain, dilated = SETTINGS[NAME], SETTINGS[NAME]._replace(dilated=True)
    batch = make_batch(plain._replace(batch=1), pixels=64)
    sizes = []
    for setting in (plain, dilated):
        backbone = build_student(setting, "sdpa").model.backbone
        features, _ = backbone(batch["pixel_values"], batch["pixel_mask"])[-1]
        sizes.append(features.shape[-2:])
    assert sizes == [(4, 4), (8, 8)]


def test_images_of_coco_give_as_many_tokens_as_the_layer_dc5():
    setting = GPU_SETTINGS["detr-r50-dc5-coco"]
    assert setting.dilated  # so of stride 16
    assert make_batch(setting._replace(batch=1))["pixel_values"].shape == (1, 3, 800, 1344)
    assert SHAPES["dc5"].Lk == (800 // 16) * (1344 // 16)
