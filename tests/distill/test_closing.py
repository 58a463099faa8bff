"""A distiller leaves both models as it found them, whatever happened in between."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from attn_kd.distill import AttentionDistiller
from attn_kd.distill.loans import Loans
from attn_kd.nn import carries_tap, replace_multihead_attention, restore_multihead_attention
from tests.plain_detr import plain_batch, plain_detr
from tests.tiny_detr import tiny_batch, tiny_detr


@pytest.fixture
def teacher():
    return tiny_detr(seed=1)


@pytest.fixture
def student():
    return tiny_detr(seed=2, encoder_layers=1)


def state(model):
    """Everything of a model but its weights that a distiller could have touched."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "implementations": [config._attn_implementation for config in configs],
        "backbone": model.config.backbone_config._attn_implementation,
        "attributes": [set(vars(module)) for module in model.modules()],
        "configuration": [set(vars(config)) for config in configs],
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attn_kd"])
def test_closing_restores_both_models(teacher, student, implementation):
    for model in (teacher, student):
        model.set_attn_implementation({"": implementation})
    teacher.train()
    teacher.model.backbone.eval()
    student.train()
    before = state(teacher), state(student)
    with AttentionDistiller(teacher, student) as distiller:
        distiller(**tiny_batch()).attention_kl.backward()
        assert not any(module.training for module in teacher.modules())
        assert student.training
    assert (state(teacher), state(student)) == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_closing_restores_models_that_share_their_backbone(teacher, student, implementation):
    for model in (teacher, student):
        model.set_attn_implementation({"": implementation})
    own = copy.deepcopy(student)
    own.model.backbone.load_state_dict(teacher.model.backbone.state_dict())
    student.model.backbone = teacher.model.backbone
    before = state(teacher), state(student)
    with AttentionDistiller(teacher, student) as distiller:
        shared = distiller(**tiny_batch()).attention_kl
    assert (state(teacher), state(student)) == before
    with AttentionDistiller(teacher, own) as distiller:
        assert distiller(**tiny_batch()).attention_kl == shared


def test_teacher_is_frozen_but_keeps_requires_grad(teacher, student):
    with AttentionDistiller(teacher, student) as distiller:
        distiller(**tiny_batch()).attention_kl.backward()
    assert any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_put_into_training_mode_meanwhile_is_used_in_evaluation_mode(student):
    teacher = tiny_detr(seed=1, dropout=0.5)
    with AttentionDistiller(teacher, student) as distiller:
        expected = distiller(**tiny_batch()).teacher.logits
        teacher.train()
        assert torch.equal(distiller(**tiny_batch()).teacher.logits, expected)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_exception_in_a_model_leaves_nothing_behind(teacher, student, role):
    before = state(teacher), state(student)
    head = {"teacher": teacher, "student": student}[role].class_labels_classifier
    with AttentionDistiller(teacher, student) as distiller:
        expected = distiller(**tiny_batch()).attention_kl
        hook = head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distiller(**tiny_batch())
        hook.remove()
        assert distiller(**tiny_batch()).attention_kl == expected
    assert (state(teacher), state(student)) == before


def test_exception_inside_the_with_block_closes(teacher, student):
    before = state(teacher), state(student)
    with pytest.raises(ZeroDivisionError), AttentionDistiller(teacher, student):
        _ = 1 / 0
    assert (state(teacher), state(student)) == before


def test_failed_construction_changes_nothing(teacher, student):
    before = state(teacher), state(student)
    student.set_attn_implementation = lambda *_: 1 / 0  # the teacher has been switched by then
    student.model.encoder.set_attn_implementation = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        AttentionDistiller(teacher, student)
    del student.set_attn_implementation, student.model.encoder.set_attn_implementation
    assert (state(teacher), state(student)) == before


@pytest.mark.parametrize("first_closed", [0, 1], ids=["opened-first", "opened-last"])
def test_distillers_that_share_a_teacher_close_in_any_order(teacher, first_closed):
    students = [tiny_detr(seed=seed, encoder_layers=1) for seed in (2, 3)]
    teacher.train()
    before = state(teacher)
    distillers = [AttentionDistiller(teacher, student) for student in students]
    expected = [distiller(**tiny_batch()).attention_kl for distiller in distillers]
    distillers[first_closed].close()
    remaining = 1 - first_closed
    assert distillers[remaining](**tiny_batch()).attention_kl == expected[remaining]
    assert not teacher.training
    distillers[remaining].close()
    assert state(teacher) == before


def test_student_may_be_the_teacher_of_a_nested_call(teacher, student):
    grandchild = tiny_detr(seed=3, encoder_layers=1)
    with AttentionDistiller(teacher, student) as outer:
        expected = outer(**tiny_batch()).attention_kl

        # The inner distiller runs while the outer one's student is in the middle of its pass.
        def distil_inside(*_):
            with AttentionDistiller(teacher, grandchild) as inner:
                distil_inside.kl = inner(**tiny_batch()).attention_kl

        hook = student.class_labels_classifier.register_forward_hook(distil_inside)
        actual = outer(**tiny_batch()).attention_kl
        hook.remove()
    assert actual == expected
    with AttentionDistiller(teacher, grandchild) as alone:
        assert distil_inside.kl == alone(**tiny_batch()).attention_kl


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_models_can_be_copied_after_closing(teacher, student, copied):
    with AttentionDistiller(teacher, student) as distiller:
        distiller(**tiny_batch())
    for model in (teacher, student):
        assert torch.equal(copied(model)(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_saved_configuration_does_not_name_the_implementation(teacher, student, tmp_path):
    with AttentionDistiller(teacher, student):
        student.save_pretrained(tmp_path)
    reloaded = type(student).from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation == "sdpa"


def test_loan_is_undone_by_its_last_holder():
    class Counter:
        made = undone = 0

        def __init__(self):
            Counter.made += 1

        def undo(self):
            Counter.undone += 1

    loans, subject = Loans(), object()
    assert loans.take(subject, Counter) is loans.take(subject, Counter)
    loans.give_back(subject)
    assert (Counter.made, Counter.undone) == (1, 0)
    loans.give_back(subject)
    assert (Counter.made, Counter.undone) == (1, 1)


def test_copy_made_while_open_is_not_reserved():
    teacher, student = (plain_detr(seed=seed) for seed in (1, 2))
    for model in (teacher, student):
        replace_multihead_attention(model)
    with AttentionDistiller(teacher, student) as distiller:
        distiller(**plain_batch())
        copied = copy.deepcopy(student)
        assert any(carries_tap(module) for module in student.modules())
    assert not any(carries_tap(module) for module in copied.modules())
    for model in (student, copied):
        restore_multihead_attention(model)
    assert state_of_modules(copied) == state_of_modules(student)


def state_of_modules(model):
    return [set(vars(module)) for module in model.modules()]
