"""DAB-DETR with replaced attention against the original: outputs, gradients, one distillation."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig
from transformers.models.dab_detr import modeling_dab_detr

from attn_kd.distill import AttentionDistiller
from attn_kd.errors import InputError
from attn_kd.integrations.dab_detr import replace_attention, restore_attention
from attn_kd.nn import TapCarrier
from tests.distill.explicit import explicit_kl
from tests.tiny_detr import tiny_batch, token_mask

ENCODER = "model.encoder.layers.{}.self_attn"
DECODER_SELF = "model.decoder.layers.{}.self_attn.self_attn"
DECODER_CROSS = "model.decoder.layers.{}.cross_attn.cross_attn"
KINDS = {
    "encoder": (ENCODER, "encoder_attentions"),
    "decoder-self": (DECODER_SELF, "decoder_attentions"),
    "decoder-cross": (DECODER_CROSS, "cross_attentions"),
}


class WholeSoftmax(TorchFunctionMode):
    """Takes every softmax in the dtype of its input: DAB-DETR takes its own in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.nn.functional.softmax:
            kwargs["dtype"] = None
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def double_by_default():
    """The model makes some of its tensors in the default dtype."""
    torch.set_default_dtype(torch.float64)
    with WholeSoftmax():
        yield
    torch.set_default_dtype(torch.float32)


def dab_detr(seed, layers=2, **options):
    """Build a tiny DAB-DETR whose maps are far from uniform."""
    torch.manual_seed(seed)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DabDetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        hidden_size=32,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=5,
        **{"dropout": 0.0, **options},
    )
    model = DabDetrForObjectDetection(config)
    for part in (model.model.encoder, model.model.decoder):
        for name, parameter in part.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.4 if "_proj" in name else 0.2)
    torch.nn.init.normal_(model.model.query_refpoint_embeddings.weight)
    return model.double().eval().requires_grad_(True)


def replaced(model):
    model = copy.deepcopy(model)
    replace_attention(model)
    return model


def batch_of(**options):
    return tiny_batch(dtype=torch.float64, **options)


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("options", [{}, {"keep_query_pos": True, "num_patterns": 2}], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_outputs_maps_and_gradients_are_those_of_the_original(padded, options):
    model, batch = dab_detr(1, **options), batch_of(padded=padded, labels=True)
    results = []
    for each in (model, replaced(model)):
        output = each(**batch, output_attentions=True)
        maps = [output[name] for _, name in KINDS.values()]
        results.append((output.logits, output.pred_boxes, maps, gradients(output.loss, each)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", [path for path, _ in KINDS.values()], ids=KINDS)
def test_attention_dropout_acts_in_training_alone_and_follows_the_seed(path):
    model, batch = replaced(dab_detr(1, attention_dropout=0.5)), batch_of()

    def logits(seed):
        torch.manual_seed(seed)
        return model(**batch).logits

    expected = logits(0)
    torch.testing.assert_close(logits(1), expected, rtol=0, atol=0)
    # Not the first layer: the decoder's has the same value, 0, for every query.
    model.get_submodule(path.format(1)).train()
    first = logits(0)
    assert not torch.allclose(first, expected)
    torch.testing.assert_close(logits(0), first, rtol=0, atol=0)
    assert not torch.allclose(logits(1), first)


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_step_is_that_of_eager_maps(kind):
    path, attentions = KINDS[kind]
    teacher, student, batch = dab_detr(1, layers=3), dab_detr(2), batch_of()
    student_map, teacher_map = (
        model(**batch, output_attentions=True)[attentions][-1] for model in (student, teacher)
    )
    rows = token_mask(batch) if kind == "encoder" else None
    expected = explicit_kl(student_map, teacher_map, rows=rows)
    assert expected > 1e-2
    ours = replaced(student)
    layers = {path.format(1): path.format(2)}
    with AttentionDistiller(replaced(teacher), ours, layers=layers) as distiller:
        actual = distiller(**batch).attention_kl
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            gradients(actual, ours), gradients(expected, student), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize(
    ("kind", "path"),
    [("encoder_self", ENCODER), ("decoder_self", DECODER_SELF), ("decoder_cross", DECODER_CROSS)],
)
def test_last_layers_are_found_by_their_kind(kind, path):
    models = replaced(dab_detr(1, layers=3)), replaced(dab_detr(2))
    with AttentionDistiller(*models, kinds=[kind]) as distiller:
        assert distiller.layers == {path.format(1): path.format(2)}


def test_checkpointed_layers_recompute_the_same():
    teacher, student = replaced(dab_detr(1)), replaced(dab_detr(2))
    kinds, found = ["encoder_self", "decoder_self", "decoder_cross"], []
    with AttentionDistiller(teacher, student, kinds=kinds) as distiller:
        for checkpointed in (False, True):
            if checkpointed:  # transformers does not offer it for this model
                for module in (*student.model.encoder.layers, *student.model.decoder.layers):
                    module.forward = partial(checkpoint, module.forward, use_reentrant=False)
            losses = [distiller(**batch_of(seed=seed)).attention_kl for seed in (0, 1)]
            found.append(gradients(sum(losses), student))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("layers", [None, {ENCODER.format(1): ENCODER.format(1)}], ids=str)
def test_model_whose_attention_was_not_replaced_is_told_how(layers):
    with pytest.raises(InputError, match=r"attn_kd.integrations.dab_detr.replace_attention\(model"):
        AttentionDistiller(dab_detr(1), dab_detr(2), layers=layers)


def test_padding_mask_is_not_written_out_for_every_query():
    model, masks = replaced(dab_detr(1)), []
    for path in (ENCODER.format(0), DECODER_CROSS.format(0)):
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    model(**batch_of())
    assert [tuple(mask.shape) for mask in masks] == [(2, 1, 1, 64)] * 2


def test_replaced_modules_are_the_same_objects_at_the_same_paths():
    model = dab_detr(1)
    modules = dict(model.named_modules())
    paths = replace_attention(model)
    assert dict(model.named_modules()) == modules
    assert sorted(paths) == sorted(
        path.format(i) for path in (ENCODER, DECODER_SELF, DECODER_CROSS) for i in range(2)
    )
    assert all(isinstance(modules[path], TapCarrier) for path in paths)
    assert replace_attention(model) == []


def test_restoring_leaves_no_trace():
    model = dab_detr(1)
    before = {path: (type(m), dict(vars(m))) for path, m in model.named_modules()}
    assert restore_attention(model) == []
    assert replace_attention(model) == restore_attention(model)
    assert {path: (type(m), dict(vars(m))) for path, m in model.named_modules()} == before
    assert model.config._attn_implementation == "eager"
    assert model.config.backbone_config._attn_implementation != "attn_kd"


def test_every_attention_class_of_the_original_is_replaced():
    model = dab_detr(1)
    replace_attention(model)
    left = {
        type(module).__name__
        for module in model.modules()
        if type(module).__module__ == modeling_dab_detr.__name__
        and "attn_weights" in type(module).forward.__code__.co_varnames
    }
    # The two layers hand maps on that their attention computed, if it did.
    assert left <= {"DabDetrEncoderLayer", "DabDetrDecoderLayerCrossAttention"}
