"""The builders: sizes of the paper, the initialisation, and what bad arguments are told."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from attn_kd import InputError
from attn_kd.models import (
    PRESETS,
    build_detr,
    build_image_processor,
    count_macs,
    count_parameters,
    get_preset,
)


# Rubin et al. 2021, table 1: one query and one class.
@pytest.mark.parametrize(
    ("layers", "parameters"),
    [(1, 27_007_174), (2, 29_900_998), (3, 32_794_822), (6, 41_476_294)],
    ids=["1/1", "2/2", "3/3", "6/6"],
)
def test_paper_size_has_the_papers_parameter_counts(layers, parameters):
    with torch.device("meta"):
        model = build_detr("detr-r50", encoder_layers=layers, decoder_layers=layers)
    assert count_parameters(model) == parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_detect_on_their_own_image_size(preset):
    model = build_detr(preset, encoder_layers=1, decoder_layers=1, num_queries=3, num_labels=2)
    height, width = get_preset(preset).input_size
    with torch.no_grad():
        outputs = model.eval()(pixel_values=torch.zeros(1, 3, height, width))
    assert outputs.logits.shape == (1, 3, 2 + 1)  # "no object" is the last class
    assert outputs.pred_boxes.shape == (1, 3, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_learns_until_frozen(preset):
    model = build_detr(preset, encoder_layers=1, decoder_layers=1)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_transformer_starts_with_xavier_weights_and_distinct_queries():
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, num_queries=16)
    width = model.config.d_model
    query_weight = model.model.encoder.layers[0].self_attn.q_proj.weight
    # Uniform on +-sqrt(6 / (fan_in + fan_out)), so the deviation is sqrt(2 / (fan_in + fan_out)).
    assert query_weight.std().item() == pytest.approx((2 / (width + width)) ** 0.5, rel=0.1)
    assert model.model.query_position_embeddings.weight.std().item() == pytest.approx(1, rel=0.15)


def test_label_names_are_in_the_configuration():
    model = build_detr(
        "detr-tiny", encoder_layers=1, decoder_layers=1, num_labels=2, id2label={0: "a", 1: "b"}
    )
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model.config.label2id == {"a": 0, "b": 1}


def test_overrides_reach_the_configuration():
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, d_model=32, dropout=0.25)
    assert model.config.d_model == 32
    assert model.config.dropout == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "detr-r5"}, r"unknown preset 'detr-r5': expected one of detr-r50, detr-tiny"),
        ({"encoder_layers": 0}, "encoder_layers is 0"),
        ({"decoder_layers": 1.5}, r"decoder_layers is 1\.5"),
        ({"num_queries": -1}, "num_queries is -1"),
        ({"num_labels": True}, "num_labels is True"),
        ({"num_labels": 2, "id2label": {0: "a"}}, r"id2label has the keys \[0\]; expected 0 to 1"),
        ({"droput": 0.1}, "'droput' is no field .* did you mean 'dropout'"),
        ({"backbone_config": None}, "'backbone_config' is no field .* that can be overridden"),
        ({"encoder_ffn_dim": "x"}, "refuses the configuration: .*encoder_ffn_dim"),
        ({"d_model": 30}, "d_model 30 is not divisible by 4 encoder heads"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"preset": "detr-tiny", **arguments}
    with pytest.raises(InputError, match=message):
        build_detr(arguments.pop("preset"), **arguments)


def test_image_processor_has_the_presets_size():
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    pixels = build_image_processor("detr-tiny")(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == get_preset("detr-tiny").input_size


def test_image_processor_takes_another_size():
    processor = build_image_processor("detr-tiny", image_size={"height": 64, "width": 96})
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape[-2:] == (64, 96)


def test_macs_of_a_layer_are_those_of_its_matrix_products():
    def macs(layers: int) -> int:
        model = build_detr("detr-tiny", encoder_layers=layers, decoder_layers=1)
        return count_macs(model, 64)

    config = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1).config
    tokens = (64 // 16) ** 2
    width, hidden = config.d_model, config.encoder_ffn_dim
    projections = 4 * tokens * width * width
    attention = 2 * tokens * tokens * width
    feed_forward = 2 * tokens * width * hidden
    assert macs(2) - macs(1) == projections + attention + feed_forward
