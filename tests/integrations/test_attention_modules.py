"""Finding attention modules in transformers models and switching their implementation."""

from __future__ import annotations

import pytest
from transformers import ResNetConfig, ResNetModel

from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import (
    SwitchedImplementation,
    attention_modules,
    is_self_attention,
    last_encoder_self_attention,
    untapped_implementation,
)
from tests.tiny_detr import tiny_detr


def test_attention_modules_of_detr_in_their_order():
    kinds = {
        path: is_self_attention(module) for path, module in attention_modules(tiny_detr()).items()
    }
    assert list(kinds.items()) == [
        ("model.encoder.layers.0.self_attn", True),
        ("model.encoder.layers.1.self_attn", True),
        ("model.decoder.layers.0.self_attn", True),
        ("model.decoder.layers.0.encoder_attn", False),
    ]


@pytest.mark.parametrize("layers", [1, 3])
def test_default_is_the_final_encoder_layer(layers):
    model = tiny_detr(encoder_layers=layers)
    expected = f"model.encoder.layers.{layers - 1}.self_attn"
    assert last_encoder_self_attention(model) == expected


def test_model_whose_layers_are_not_an_encoder_lists_its_attention_modules():
    decoder = tiny_detr().model.decoder
    with pytest.raises(InputError, match=r"its attention modules are 'layers\.0\.self_attn', 'lay"):
        last_encoder_self_attention(decoder)


def test_model_without_attention_is_named():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(
        InputError, match=r"ResNetModel has no encoder self-attention .* no attention module"
    ):
        last_encoder_self_attention(model)


def test_switching_and_undoing_leaves_the_backbone_alone():
    model = tiny_detr()
    module = model.get_submodule("model.encoder.layers.0.self_attn")
    backbone = model.config.backbone_config._attn_implementation
    switched = SwitchedImplementation(model, module)
    assert (switched.original, model.config._attn_implementation) == ("sdpa", "attn_kd")
    assert model.config.backbone_config._attn_implementation == backbone
    switched.undo()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("originals", "untapped"),
    [
        (["sdpa", "sdpa"], "sdpa"),
        (["attn_kd"], "attn_kd"),
        (["eager"], "sdpa"),
        (["attn_kd", "sdpa"], "sdpa"),
    ],
)
def test_layers_beside_tapped_ones_keep_an_implementation_that_takes_bool_masks(
    originals, untapped
):
    assert untapped_implementation(originals) == untapped
