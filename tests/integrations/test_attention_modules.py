"""Finding attention modules, telling their kinds, and saying what cannot be distilled."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Dinov2Config,
    LlamaConfig,
    LlamaModel,
    ResNetConfig,
    ResNetModel,
    SamMaskDecoderConfig,
)
from transformers.models.sam.modeling_sam import SamAttention

from attn_kd.integrations.attention_modules import (
    attention_kinds,
    attention_modules,
    carries_own_tap,
    is_attention,
    is_self_attention,
    layers_of_kind,
    not_attention,
    without_kind,
)
from attn_kd.nn import MultiheadAttention
from tests.integrations.zoo import FAMILIES
from tests.tiny_detr import tiny_detr


@pytest.fixture(scope="module")
def models():
    """Models of 2 layers, built when asked for."""
    built = {}

    def model(family):
        if family not in built:
            built[family] = FAMILIES[family].build(seed=0, layers=2)
        return built[family]

    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["encoder_self", "decoder_self", "decoder_cross"])
def test_layers_of_each_kind(models, family, kind):
    # Before transformers 5.20 some attention modules were wrapped in another `attention`.
    paths = [path.replace("n.attention", "n") for path in layers_of_kind(models(family), kind)]
    template = FAMILIES[family].layers.get(kind, "").replace("n.attention", "n")
    # The ViTs of RF-DETR and LW-DETR have one layer more than their decoders.
    assert paths == [template.format(i) for i in range(len(paths))]
    assert bool(paths) is bool(template)


@pytest.mark.parametrize("family", FAMILIES)
def test_deformable_attention_is_told_from_attention_and_refused_by_name(models, family):
    model = models(family)
    for kind, path in FAMILIES[family].deformable.items():
        assert not is_attention(model.get_submodule(path))
        last = path.replace(".0.", ".1.")
        assert f"{last!r} is deformable attention" in without_kind(model, kind)
        assert "no map over the keys" in not_attention(model.get_submodule(path))


def test_attention_modules_of_detr_in_their_order():
    model = tiny_detr()
    kinds = {
        "model.encoder.layers.0.self_attn": "encoder_self",
        "model.encoder.layers.1.self_attn": "encoder_self",
        "model.decoder.layers.0.self_attn": "decoder_self",
        "model.decoder.layers.0.encoder_attn": "decoder_cross",
    }
    assert list(attention_kinds(model).items()) == list(kinds.items())
    for path, module in attention_modules(model).items():
        assert is_self_attention(module, path) is kinds[path].endswith("self")


def test_part_of_a_model_is_judged_by_its_own_class():
    decoder = tiny_detr().model.decoder
    assert list(attention_kinds(decoder).values()) == ["decoder_self", "decoder_cross"]


def test_vit_backbone_beside_an_encoder_is_not_the_encoder():
    backbone = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        num_queries=3,
    )
    with torch.device("meta"):
        model = DetrForObjectDetection(config)
    assert layers_of_kind(model, "encoder_self") == ["model.encoder.layers.0.self_attn"]
    assert len(layers_of_kind(model, "backbone_self")) == 1


def test_causal_layers_are_a_decoders():
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    assert attention_kinds(LlamaModel(config)) == {"layers.0.self_attn": "decoder_self"}


def test_modules_that_take_query_key_and_value_are_told_by_their_names():
    """SAM's attention modules are all of one class."""
    module = SamAttention(SamMaskDecoderConfig(hidden_size=8, num_attention_heads=2))
    assert is_self_attention(module, "layers.0.self_attn")
    assert not is_self_attention(module, "layers.0.cross_attn_token_to_image")


def test_missing_kind_names_what_there_is():
    message = without_kind(tiny_detr().model.decoder, "encoder_self")
    assert message == (
        "DetrDecoder has no encoder self-attention to distil (its attention modules are "
        "'layers.0.self_attn', 'layers.0.encoder_attn')"
    )


def test_model_without_attention_is_named():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    message = without_kind(model, "encoder_self")
    assert message.startswith("ResNetModel has no encoder self-attention")
    assert "no attention module" in message


class TorchDecoderLayer(nn.Module):
    """The names of torch.nn.TransformerDecoderLayer, which facebookresearch's DETR has too."""

    def __init__(self):
        super().__init__()
        self.self_attn = MultiheadAttention(8, 2)
        self.multihead_attn = MultiheadAttention(8, 2)


def test_replaced_modules_of_plain_torch_models_are_told_by_their_names():
    model = nn.ModuleDict({"decoder": nn.ModuleList([TorchDecoderLayer()])})
    assert attention_kinds(model) == {
        "decoder.0.self_attn": "decoder_self",
        "decoder.0.multihead_attn": "decoder_cross",
    }
    assert carries_own_tap(model, "decoder.0.self_attn")


def test_own_word_of_a_module_overrules_its_name():
    layer = TorchDecoderLayer()
    layer.multihead_attn.self_attention = True
    assert is_self_attention(layer.multihead_attn, "multihead_attn")


def test_torchs_own_module_is_told_how_to_become_one():
    module = nn.MultiheadAttention(8, 2)
    assert not is_attention(module)
    assert "attn_kd.nn.replace_multihead_attention(model)" in not_attention(module)


@pytest.mark.parametrize("family", ["yolos", "rf-detr", "lw-detr"])
def test_layers_that_no_keyword_reaches_carry_their_taps(models, family):
    """YOLOS hands its layers no keywords, RF-DETR and LW-DETR hand their backbones none."""
    (path, *_) = layers_of_kind(models(family), "encoder_self")
    assert carries_own_tap(models(family), path)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("detr", "decoder_cross"),
        ("rt-detr", "encoder_self"),
        ("rf-detr", "decoder_self"),
        ("lw-detr", "decoder_self"),
    ],
)
def test_layers_that_keywords_reach_do_not(models, family, kind):
    (path, *_) = layers_of_kind(models(family), kind)
    assert not carries_own_tap(models(family), path)
