"""A DETR in plain torch is distilled after its attention was replaced: equal to explicit maps."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attn_kd.distill import AttentionDistiller
from attn_kd.errors import InputError
from attn_kd.nn import replace_multihead_attention
from tests.distill.explicit import explicit_kl
from tests.plain_detr import STRIDE, plain_batch, plain_detr

ENCODER = "transformer.encoder.layers.{}.self_attn"
DECODER_SELF = "transformer.decoder.layers.0.self_attn"
DECODER_CROSS = "transformer.decoder.layers.0.multihead_attn"
LAYERS = {
    ENCODER.format(0): ENCODER.format(1),
    DECODER_SELF: DECODER_SELF,
    DECODER_CROSS: DECODER_CROSS,
}


def replaced(model):
    model = copy.deepcopy(model)
    replace_multihead_attention(model, returns_weights=False)
    return model


@pytest.fixture
def teacher():
    return plain_detr(seed=1)


@pytest.fixture
def student():
    return plain_detr(seed=2, encoder_layers=1)


def open_map(model, path, batch):
    """Return (the model's output, one map [B, H, Lq, Lk]) by torch's own attention."""
    maps = []
    attention = model.get_submodule(path)
    hooks = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "average_attn_weights": False}),
            with_kwargs=True,
        ),
        attention.register_forward_hook(lambda _, __, output: maps.append(output[1])),
    ]
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    return output, maps[0]


def detection_loss(output):
    return output["pred_logits"].square().mean() + output["pred_boxes"].square().mean()


def explicit_loss(teacher, student, layers, batch):
    """Detection loss and mean divergence by explicit maps."""
    real = ~batch["mask"][:, ::STRIDE, ::STRIDE].flatten(1)
    divergences = []
    for student_path, teacher_path in layers.items():
        output, student_map = open_map(student, student_path, batch)
        rows = real if "encoder" in student_path else None
        teacher_map = open_map(teacher, teacher_path, batch)[1]
        divergences.append(explicit_kl(student_map, teacher_map, rows=rows))
    return detection_loss(output), torch.stack(divergences).mean()


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("layers", [None, LAYERS], ids=["default", "three-layers"])
def test_distillation_step_is_that_of_explicit_maps(teacher, student, layers, padded):
    batch = plain_batch(padded=padded)
    pairs = layers or {ENCODER.format(0): ENCODER.format(1)}
    detection, divergence = explicit_loss(teacher, student, pairs, batch)
    expected = gradients(0.3 * detection + 0.7 * divergence, student)
    ours = replaced(student)
    with AttentionDistiller(replaced(teacher), ours, layers=layers) as distiller:
        assert distiller.layers == pairs
        result = distiller(**batch)
        loss = 0.3 * detection_loss(result.student) + 0.7 * result.attention_kl
        actual = gradients(loss, ours)
    assert divergence > 0.1
    torch.testing.assert_close(result.attention_kl, divergence)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-10)


def test_outputs_are_those_of_the_original_models(teacher, student):
    batch = plain_batch()
    with AttentionDistiller(replaced(teacher), replaced(student), layers=LAYERS) as distiller:
        result = distiller(**batch)
    torch.testing.assert_close(result.student, student(**batch))
    torch.testing.assert_close(result.teacher, teacher(**batch))


def test_checkpointed_layers_of_two_passes(teacher, student):
    ours = replaced(student)
    batches = [plain_batch(seed=seed) for seed in (1, 2)]
    for module in ours.transformer.encoder.layers:
        run = module.forward
        module.forward = lambda *args, run=run: checkpoint(run, *args, use_reentrant=False)
    with AttentionDistiller(replaced(teacher), ours, layers=LAYERS) as distiller:
        loss = sum(distiller(**batch).attention_kl for batch in batches)
        actual = gradients(loss, ours)
    expected = [explicit_loss(teacher, student, LAYERS, batch)[1] for batch in batches]
    torch.testing.assert_close(loss, sum(expected))
    torch.testing.assert_close(actual, gradients(sum(expected), student), rtol=1e-6, atol=1e-10)


def test_compiled_student(teacher, student):
    torch._dynamo.reset()
    ours = replaced(student)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    batch = plain_batch()
    with AttentionDistiller(replaced(teacher), ours, layers=LAYERS) as distiller:
        actual = gradients(distiller.run(batch, student=compiled).attention_kl, ours)
        expected = gradients(distiller(**batch).attention_kl, ours)
    torch.testing.assert_close(actual, expected)


def test_closing_leaves_nothing_on_the_modules(teacher, student):
    models = replaced(teacher), replaced(student)
    before = [{p: set(vars(m)) for p, m in model.named_modules()} for model in models]
    with AttentionDistiller(*models, layers=LAYERS) as distiller:
        distiller(**plain_batch())
    after = [{p: set(vars(m)) for p, m in model.named_modules()} for model in models]
    assert after == before


@pytest.mark.parametrize("layers", [None, LAYERS], ids=["default", "by-path"])
def test_model_whose_attention_was_not_replaced_is_told_how(teacher, student, layers):
    with pytest.raises(InputError, match=r"attn_kd.nn.replace_multihead_attention\(model\) makes"):
        AttentionDistiller(teacher, student, layers=layers)


def test_transformers_need_not_be_installed():
    program = """
import sys
sys.modules["transformers"] = None
from attn_kd import AttentionDistiller
from attn_kd.nn import replace_multihead_attention
from tests.plain_detr import plain_batch, plain_detr
models = plain_detr(seed=1), plain_detr(seed=2)
assert all(replace_multihead_attention(model) for model in models)
with AttentionDistiller(*models) as distiller:
    assert distiller(**plain_batch()).attention_kl > 0.1
"""
    subprocess.run([sys.executable, "-c", program], check=True)
