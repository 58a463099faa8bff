"""DETR (Carion et al. 2020) by transformers, of a preset size and any number of layers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from attn_kd.errors import InputError
from attn_kd.models.backbone import thaw_batch_norm
from attn_kd.models.presets import Preset, get_preset


def build_detr(
    preset: str,
    *,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_queries: int | None = None,
    num_labels: int = 1,
    id2label: Mapping[int, str] | None = None,
    **overrides: Any,
) -> DetrForObjectDetection:
    """Build a DETR with random weights; nothing is downloaded.

    The model takes ``pixel_values [B, 3, H, W]`` float32 and ``pixel_mask [B, H, W]`` and gives
    ``logits [B, num_queries, num_labels + 1]`` (the last class is "no object") and
    ``pred_boxes [B, num_queries, 4]`` (centre x, centre y, width, height, as shares of the image).

    Args:
        preset: name of a :class:`~attn_kd.models.Preset`.
        encoder_layers, decoder_layers: the n/n of DETR-n/n.
        num_queries: object queries; by default the preset's.
        num_labels: classes, without "no object".
        id2label: names of the classes 0 ... num_labels - 1.
        overrides: further fields of transformers' ``DetrConfig`` that differ from the preset's.

    Raises:
        InputError: an unknown preset or configuration field, a number below 1, names that do not
            match ``num_labels``, or a ``d_model`` that the heads do not divide.
    """
    spec = get_preset(preset)
    sizes = {
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "num_queries": spec.num_queries if num_queries is None else num_queries,
        "num_labels": num_labels,
    }
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; expected a whole number of at least 1")
    labels = _label_names(num_labels, id2label)
    model = DetrForObjectDetection(_config(spec, sizes, labels, overrides))
    if spec.trainable_batch_norm:
        thaw_batch_norm(model)
    model.requires_grad_(True)  # transformers freezes the backbone's convolutions
    _initialise_transformer(model)
    return model


def build_image_processor(
    preset: str, *, image_size: Mapping[str, int] | None = None
) -> DetrImageProcessorPil:
    """The image processor that goes with a preset: resizing, scaling to [0, 1], normalisation.

    Args:
        preset: name of a :class:`~attn_kd.models.Preset`.
        image_size: ``size`` of transformers' ``DetrImageProcessor`` if not the preset's, e.g.
            ``{"height": 160, "width": 160}`` or ``{"max_height": 416, "max_width": 416}``.

    Raises:
        InputError: an unknown preset.
    """
    size = get_preset(preset).image_size if image_size is None else image_size
    return DetrImageProcessorPil(size=dict(size))


def _label_names(num_labels: int, id2label: Mapping[int, str] | None) -> dict[int, str]:
    if id2label is None:
        return {label: f"LABEL_{label}" for label in range(num_labels)}
    if sorted(id2label) != list(range(num_labels)):
        raise InputError(
            f"id2label has the keys {sorted(id2label)}; expected 0 to {num_labels - 1}, "
            f"since num_labels is {num_labels}"
        )
    return dict(id2label)


def _config(
    spec: Preset, sizes: Mapping[str, int], labels: dict[int, str], overrides: Mapping[str, Any]
) -> DetrConfig:
    depth = len(spec.backbone["depths"])
    settled = {
        "encoder_layers": sizes["encoder_layers"],
        "decoder_layers": sizes["decoder_layers"],
        "num_queries": sizes["num_queries"],
        "backbone_config": ResNetConfig(**spec.backbone, out_features=[f"stage{depth}"]),
        "id2label": labels,  # transformers derives num_labels from it
        "label2id": {name: label for label, name in labels.items()},
    }
    known = {field.name for field in dataclasses.fields(DetrConfig)} - settled.keys()
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{name!r} is no field of DetrConfig that can be overridden{hint}")
    try:
        config = DetrConfig(
            **{**spec.transformer, **overrides, **settled},
            use_timm_backbone=False,
            trainable_batch_norm=spec.trainable_batch_norm,
        )
    except StrictDataclassError as error:
        raise InputError(f"transformers refuses the configuration: {error}") from error
    for side in ("encoder", "decoder"):
        heads = getattr(config, f"{side}_attention_heads")
        if config.d_model % heads:
            raise InputError(f"d_model {config.d_model} is not divisible by {heads} {side} heads")
    return config


def _initialise_transformer(model: DetrForObjectDetection) -> None:
    """Initialise all but the backbone as facebookresearch/detr does.

    transformers draws every weight from N(0, 0.02 ** 2), enough where weights are loaded next; the
    object queries then start out alike and a narrow transformer passes on next to nothing. The
    original uses Xavier's uniform distribution in the transformer, N(0, 1) for the queries, and
    torch's defaults elsewhere.
    """
    for part in (model.model.encoder, model.model.decoder):
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    for module in model.bbox_predictor.layers:
        module.reset_parameters()
    model.class_labels_classifier.reset_parameters()
    model.model.input_projection.reset_parameters()
    model.model.query_position_embeddings.reset_parameters()
