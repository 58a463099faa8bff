"""The backbone: batch norm that learns, weights copied from the teacher, and freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from attn_kd import InputError
from attn_kd.models import build_detr, count_parameters, freeze_backbone, load_backbone_weights


def tiny(**arguments):
    return build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, **arguments)


def backbone_state(model):
    return {name: t.clone() for name, t in model.model.backbone.state_dict().items()}


def batch():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_tiny_preset_tracks_batch_statistics():
    model = tiny().train()
    before = backbone_state(model)
    model(pixel_values=batch())
    after = backbone_state(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.endswith("running_mean") for name in moved)


def test_frozen_backbone_keeps_every_tensor_through_a_training_step():
    model = tiny()
    freeze_backbone(model)
    before = backbone_state(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()
    model(pixel_values=batch()).logits.sum().backward()
    optimiser.step()
    after = backbone_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_backbone_computes_the_same_in_training_and_evaluation():
    model = tiny()
    freeze_backbone(model)
    pixels, mask = batch(), torch.ones(2, 64, 64)
    trained = model.train().model.backbone(pixels, mask)[-1][0]
    evaluated = model.eval().model.backbone(pixels, mask)[-1][0]
    assert torch.equal(trained, evaluated)


def test_freezing_keeps_the_parameters_and_their_number():
    model = tiny()
    before = dict(model.named_parameters())
    count = count_parameters(model)
    freeze_backbone(model)
    assert count_parameters(model) == count
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_freezing_leaves_the_transformer_learning():
    model = tiny()
    freeze_backbone(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".backbone." in name}


def test_freezing_twice_is_freezing_once():
    model = tiny()
    freeze_backbone(model)
    freeze_backbone(model)
    norms = [m for m in model.model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.train().training for norm in norms)


def test_student_gets_the_teachers_backbone_and_its_statistics():
    teacher = build_detr("detr-tiny", encoder_layers=3, decoder_layers=2).train()
    teacher(pixel_values=batch())  # moves the running statistics
    student = tiny()
    load_backbone_weights(student, teacher)
    pixels, mask = batch(), torch.ones(2, 64, 64)
    expected = teacher.eval().model.backbone(pixels, mask)[-1][0]
    assert torch.equal(student.eval().model.backbone(pixels, mask)[-1][0], expected)


def test_copied_weights_are_not_shared():
    teacher, student = tiny(), tiny()
    load_backbone_weights(student, teacher)
    with torch.no_grad():
        for parameter in student.model.backbone.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in teacher.model.backbone.parameters())


def test_backbones_of_different_shape_are_refused():
    wide = build_detr("detr-r50", encoder_layers=1, decoder_layers=1)
    with pytest.raises(InputError, match="does not match the teacher's: model"):
        load_backbone_weights(tiny(), wide)
