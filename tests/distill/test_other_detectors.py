"""The distiller works on the DETR family at large: what it needs is transformers' interface."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
)

from attn_kd.distill import AttentionDistiller
from tests.distill.explicit import explicit_kl


def conditional_detr(layers):
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = ConditionalDetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=3,
    )
    return ConditionalDetrForObjectDetection(config)


def rt_detr(layers):
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 32, 32],
        encoder_attention_heads=4,
        d_model=32,
        num_queries=5,
        decoder_in_channels=[32, 32, 32],
        decoder_layers=layers,
        decoder_attention_heads=4,
    )
    return RTDetrForObjectDetection(config)


def sharpened(model, seed):
    """Redraw the attention's weights so that maps are far from uniform."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight") and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


CROSS = "model.decoder.layers.{}.encoder_attn"
SELF = "model.decoder.layers.{}.self_attn"


@pytest.mark.parametrize(
    ("build", "layers", "maps"),
    [
        pytest.param(conditional_detr, None, "encoder_attentions", id="conditional-encoder"),
        # Its queries and keys are twice as wide as its values.
        pytest.param(
            conditional_detr,
            {CROSS.format(0): CROSS.format(1)},
            "cross_attentions",
            id="conditional-cross",
        ),
        pytest.param(rt_detr, None, "encoder_attentions", id="rt-encoder"),
        pytest.param(
            rt_detr, {SELF.format(0): SELF.format(1)}, "decoder_attentions", id="rt-decoder"
        ),
    ],
)
def test_divergence_is_that_of_explicit_maps(build, layers, maps):
    student, teacher = sharpened(build(1), 1), sharpened(build(2), 2)
    images = torch.randn(2, 3, 64, 64)
    with AttentionDistiller(teacher, student, layers=layers) as distiller:
        actual = distiller(pixel_values=images).attention_kl
        actual.backward()
    explicit = []
    for model in (student, teacher):
        model.set_attn_implementation({"": "eager"})
        explicit.append(model(pixel_values=images, output_attentions=True)[maps][-1])
    expected = explicit_kl(*explicit)
    assert expected > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)
