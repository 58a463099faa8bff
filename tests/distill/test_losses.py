"""Eq. 3 and its parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from attn_kd.distill import AttentionDistiller, distillation_loss
from attn_kd.distill.losses import class_divergence
from attn_kd.errors import InputError
from tests.tiny_detr import tiny_batch, tiny_detr


@pytest.fixture
def models():
    return tiny_detr(seed=1), tiny_detr(seed=2, auxiliary_loss=True, decoder_layers=2)


@pytest.fixture
def result(models):
    with AttentionDistiller(*models) as distiller:
        return distiller(**tiny_batch(labels=True))


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_total_is_equation_3(result, alpha):
    loss = distillation_loss(result, alpha=alpha, temperature=2.0, class_weight=0.5)
    distilled = loss.attention_kl + 0.5 * 2.0**2 * loss.class_kl
    torch.testing.assert_close(loss.total, (1 - alpha) * loss.detection + alpha * distilled)


def test_class_term_is_left_out_by_default(result):
    loss = distillation_loss(result, alpha=0.7)
    torch.testing.assert_close(loss.total, 0.3 * loss.detection + 0.7 * loss.attention_kl)
    assert loss.class_kl == 0.0


def test_detection_part_is_the_students_own_loss_with_its_auxiliary_terms(models, result):
    alone = models[1](**tiny_batch(labels=True))
    assert "loss_ce_0" in alone.loss_dict
    torch.testing.assert_close(distillation_loss(result, alpha=0.5).detection, alone.loss)


def test_baseline_measures_the_divergence_without_its_gradient(models, result):
    loss = distillation_loss(result, alpha=0.0)
    assert loss.attention_kl > 0
    actual = torch.autograd.grad(loss.total, list(models[1].model.encoder.parameters()))
    alone = models[1](**tiny_batch(labels=True)).loss
    expected = torch.autograd.grad(alone, list(models[1].model.encoder.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_total_trains_every_trainable_parameter(models, result):
    distillation_loss(result, alpha=0.7, class_weight=1.0).total.backward()
    untrained = {
        name
        for name, parameter in models[1].named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
    assert untrained == set()


def test_class_divergence_is_the_kl_of_the_softened_softmaxes():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    softened = (F.log_softmax(logits / 2.0, -1) for logits in (student, teacher))
    log_student, log_teacher = softened
    # F.kl_div(x, y) is KL(y || x), summed; 2 images of 3 object queries.
    expected = F.kl_div(log_teacher, log_student, reduction="sum", log_target=True) / (2 * 3)
    torch.testing.assert_close(class_divergence(student, teacher, 2.0), expected)


def test_class_divergence_by_hand():
    student = torch.tensor([[[math.log(3.0), 0.0]]])  # probabilities 3/4, 1/4
    teacher = torch.zeros(1, 1, 2)  # 1/2, 1/2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert class_divergence(student, teacher, 1.0).item() == pytest.approx(expected)


def test_class_divergence_gives_the_teacher_no_gradient():
    student, teacher = torch.randn(2, 1, 3, 4, requires_grad=True).unbind()
    teacher = teacher.detach().requires_grad_()
    class_divergence(student, teacher, 1.0).backward()
    assert teacher.grad is None


def test_different_numbers_of_object_queries_are_refused():
    student, teacher = tiny_detr(num_queries=3), tiny_detr(num_queries=5)
    with AttentionDistiller(teacher, student) as distiller:
        result = distiller(**tiny_batch(labels=True))
    assert distillation_loss(result, alpha=0.7).total.isfinite()
    with pytest.raises(InputError, match=r"\(2, 3, 3\), teacher logits \(2, 5, 3\)"):
        distillation_loss(result, alpha=0.7, class_weight=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.2}, "alpha=1.2"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": 0.7, "temperature": 0.0}, "temperature=0.0"),
        ({"alpha": 0.7, "class_weight": -1.0}, "class_weight=-1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_out_of_range_are_refused(result, options, message):
    with pytest.raises(InputError, match=message):
        distillation_loss(result, **options)


def test_batch_without_labels_is_refused(models):
    with AttentionDistiller(*models) as distiller:
        result = distiller(**tiny_batch())
    with pytest.raises(InputError, match="labels"):
        distillation_loss(result, alpha=0.7)
