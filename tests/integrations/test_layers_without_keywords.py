"""Distilling layers that no keyword argument of their model reaches: they carry their taps."""

from __future__ import annotations

import pytest
import torch

from attn_kd import AttentionDistiller
from tests.integrations.zoo import FAMILIES
from tests.tiny_detr import checkpoint_activations


@pytest.fixture(params=["yolos", "rf-detr", "lw-detr"])
def family(request):
    return FAMILIES[request.param]


def batches(family):
    first = family.batch()
    return [first, first | {"pixel_values": first["pixel_values"].flip(-1)}]


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def checkpoint_layers(model):
    """RF-DETR and LW-DETR themselves do not support checkpointing, but their backbones do."""
    part = next(m for m in model.modules() if getattr(m, "supports_gradient_checkpointing", False))
    checkpoint_activations(part)


def test_checkpointed_layers_recompute_with_the_record_of_their_own_pass(family):
    student, teacher = family.build(seed=1).train(), family.build(seed=2)
    with AttentionDistiller(teacher, student) as distiller:
        expected = sum(distiller(**batch).attention_kl for batch in batches(family))
        expected = gradients(student, expected)
        checkpoint_layers(student)
        both = sum([distiller(**batch).attention_kl for batch in batches(family)])
        actual = gradients(student, both)
    torch.testing.assert_close(actual, expected)


def test_closing_leaves_no_trace(family):
    student, teacher = family.build(seed=1), family.build(seed=2)
    before = [set(vars(module)) for model in (student, teacher) for module in model.modules()]
    with AttentionDistiller(teacher, student) as distiller:
        distiller(**family.batch())
    after = [set(vars(module)) for model in (student, teacher) for module in model.modules()]
    assert after == before


def test_student_alone_runs_as_ever_while_a_distiller_is_open(family):
    student, teacher = family.build(seed=1), family.build(seed=2)
    expected = student(**family.batch()).logits
    with AttentionDistiller(teacher, student) as distiller:
        distiller(**family.batch())
        torch.testing.assert_close(student(**family.batch()).logits, expected)


def test_compiled_student_is_one_graph_and_is_compiled_once():
    family = FAMILIES["yolos"]
    student, teacher = family.build(seed=1), family.build(seed=2)
    torch._dynamo.reset()
    with AttentionDistiller(teacher, student) as distiller:
        compiled = torch.compile(student, backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = [distiller.run(batch, student=compiled) for batch in batches(family)]
        for one, batch in zip(actual, batches(family), strict=True):
            other = distiller(**batch)
            torch.testing.assert_close(one.attention_kl, other.attention_kl)
            torch.testing.assert_close(
                gradients(student, one.attention_kl), gradients(student, other.attention_kl)
            )
