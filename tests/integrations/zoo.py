"""Tiny random models of every detector family that attn_kd is to work in, built without downloads.

`FAMILIES` is the table that the tests run through. A family that the installed transformers lacks
is skipped by `build`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attn_kd.integrations.attention_modules import attention_modules

HEADS = 4
LABELS = 3


@dataclass(frozen=True)
class Family:
    """How to build one family's model, and what is known of its attention layers.

    `layers` maps each kind of distillable layer to the path of layer {0}; `deformable` holds the
    attention that transformers does not dispatch, by the kind that it stands for. `loss_dtype` is
    the widest in which the family's loss can be computed.
    """

    model_class: str
    config: Callable[[int, int], Any]  # (layers, width) -> configuration
    layers: dict[str, str]
    image_size: int = 64
    takes_pixel_mask: bool = True
    detects: bool = True
    loss_dtype: torch.dtype = torch.float64
    deformable: dict[str, str] = field(default_factory=dict)

    def build(self, *, seed: int, layers: int = 2, width: int = 32, **settings: Any) -> nn.Module:
        """Return a model in evaluation mode whose attention maps are far from uniform.

        `settings` override those of its configuration.
        """
        if not hasattr(transformers, self.model_class):
            pytest.skip(f"transformers {transformers.__version__} has no {self.model_class}")
        torch.manual_seed(seed)
        config = self.config(layers, width)
        config.update(settings)
        model = getattr(transformers, self.model_class)(config)
        _redraw(model)
        _settle_batch_norms(model, self.batch())
        return model.eval().requires_grad_(True)  # transformers freezes part of some backbones

    def batch(self, *, padded: bool = False, labels: bool = False) -> dict[str, Any]:
        """Two images; padded ones are 5/8 of the width and 6/8 of the height."""
        generator, size = torch.Generator().manual_seed(0), self.image_size
        images = torch.randn(2, 3, size, size, generator=generator)
        batch: dict[str, Any] = {"pixel_values": images}
        if self.takes_pixel_mask:
            mask = batch["pixel_mask"] = torch.ones(2, size, size, dtype=torch.long)
            if padded:
                mask[0, :, 5 * size // 8 :] = 0
                mask[1, 6 * size // 8 :] = 0
                images *= mask[:, None]
        if labels:
            box = torch.tensor([[0.5, 0.4, 0.2, 0.3]])
            target = {"class_labels": torch.tensor([1]), "boxes": box}
            batch["labels"] = [target, {name: part[:0] for name, part in target.items()}]
        return batch


def to(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return `batch` with everything that is floating point, labels included, in `dtype`."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {name: convert(part) for name, part in value.items()}
        return [convert(part) for part in value]

    return convert(batch)


def _redraw(model: nn.Module) -> None:
    """Draw all weights anew, at a gain of 1 and for queries and keys of 1.5.

    At transformers' own scales every map is uniform, and features vanish on their way through the
    convolutions until rounding decides which of them a two-stage decoder selects.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for module in attention_modules(model).values():
        for projection in module.modules():
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=1.5 * projection.in_features**-0.5)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter)  # class tokens and position embeddings


@torch.no_grad()
def _settle_batch_norms(model: nn.Module, batch: dict[str, Any]) -> None:
    """Give batch norms the statistics that they meet, so that their outputs are of size 1."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        model.train()(**batch)


def _resnet() -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )


def _detr(config_class: str, **fields: Any) -> Callable[[int, int], Any]:
    def config(layers: int, width: int) -> Any:
        return getattr(transformers, config_class)(
            use_timm_backbone=False,
            backbone_config=_resnet(),
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=width,
            decoder_ffn_dim=width,
            num_queries=5,
            num_labels=LABELS,
            dropout=0.0,
            **fields,
        )

    return config


def _rt_detr_backbone() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _hgnet() -> Any:
    return transformers.HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


def _rt_detr(
    config_class: str, backbone: Callable[[], Any], **fields: Any
) -> Callable[[int, int], Any]:
    def config(layers: int, width: int) -> Any:
        return getattr(transformers, config_class)(
            backbone_config=backbone(),
            encoder_hidden_dim=width,
            encoder_in_channels=[16, 16, 16],
            encoder_attention_heads=HEADS,
            encoder_layers=layers,
            encoder_ffn_dim=width,
            hidden_expansion=0.5,
            d_model=width,
            decoder_in_channels=[width, width, width],
            decoder_layers=layers,
            decoder_attention_heads=HEADS,
            decoder_ffn_dim=width,
            num_queries=5,
            num_denoising=4,
            num_labels=LABELS,
            **fields,
        )

    return config


def _vit_detr_head(layers: int, width: int) -> dict[str, Any]:
    """What RF-DETR and LW-DETR have in common: a shallow decoder on a ViT."""
    return {
        "d_model": width,
        "decoder_layers": layers,
        "decoder_self_attention_heads": HEADS,
        "decoder_cross_attention_heads": HEADS,
        "decoder_ffn_dim": width,
        "num_queries": 5,
        "group_detr": 1,
        "c2f_num_blocks": 1,
        "num_labels": LABELS,
        "dropout": 0.0,
    }


def _rf_detr(layers: int, width: int) -> Any:
    # Windows in all layers but the last; the batch of a windowed layer is images times windows.
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=width,
        num_hidden_layers=layers + 1,
        num_attention_heads=HEADS,
        mlp_ratio=1,
        image_size=64,
        patch_size=8,
        num_windows=2,
        out_indices=[layers + 1],
        use_mask_token=False,
    )
    head = _vit_detr_head(layers, width)
    return transformers.RfDetrConfig(backbone_config=backbone, num_feature_levels=1, **head)


def _lw_detr(layers: int, width: int) -> Any:
    backbone = transformers.LwDetrViTConfig(
        hidden_size=width,
        num_hidden_layers=layers + 1,
        num_attention_heads=HEADS,
        mlp_ratio=1,
        image_size=64,
        pretrain_image_size=64,
        patch_size=8,
        num_windows=4,
        window_block_indices=list(range(layers)),
        out_indices=[layers + 1],
    )
    head = _vit_detr_head(layers, width)
    return transformers.LwDetrConfig(
        backbone_config=backbone, projector_scale_factors=[1.0], **head
    )


def _vit(config_class: str, **fields: Any) -> Callable[[int, int], Any]:
    def config(layers: int, width: int) -> Any:
        sizes = {"image_size": 32, "patch_size": 8, "num_labels": LABELS, **fields}
        return getattr(transformers, config_class)(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=HEADS, **sizes
        )

    return config


_DETR_LAYERS = {
    "encoder_self": "model.encoder.layers.{0}.self_attn",
    "decoder_self": "model.decoder.layers.{0}.self_attn",
    "decoder_cross": "model.decoder.layers.{0}.encoder_attn",
}
_HYBRID_LAYERS = {
    "encoder_self": "model.encoder.aifi.0.layers.{0}.self_attn",
    "decoder_self": "model.decoder.layers.{0}.self_attn",
}
_VIT_DETR_LAYERS = {
    "encoder_self": "model.backbone.backbone.encoder.layer.{0}.attention",
    "decoder_self": "model.decoder.layers.{0}.self_attn",
}
_DEFORMABLE_DECODER = {"decoder_cross": "model.decoder.layers.0.encoder_attn"}
_VIT_INPUTS: dict[str, Any] = {"image_size": 32, "takes_pixel_mask": False, "detects": False}

FAMILIES = {
    "detr": Family("DetrForObjectDetection", _detr("DetrConfig"), _DETR_LAYERS),
    "conditional-detr": Family(
        "ConditionalDetrForObjectDetection", _detr("ConditionalDetrConfig"), _DETR_LAYERS
    ),
    "deformable-detr": Family(
        "DeformableDetrForObjectDetection",
        _detr("DeformableDetrConfig", num_feature_levels=1),
        {"decoder_self": _DETR_LAYERS["decoder_self"]},
        deformable={"encoder_self": "model.encoder.layers.0.self_attn", **_DEFORMABLE_DECODER},
    ),
    "rt-detr": Family(
        "RTDetrForObjectDetection",
        _rt_detr("RTDetrConfig", _rt_detr_backbone),
        _HYBRID_LAYERS,
        deformable=_DEFORMABLE_DECODER,
    ),
    "rt-detr-v2": Family(
        "RTDetrV2ForObjectDetection",
        _rt_detr("RTDetrV2Config", _rt_detr_backbone),
        _HYBRID_LAYERS,
        deformable=_DEFORMABLE_DECODER,
    ),
    "d-fine": Family(
        "DFineForObjectDetection",
        _rt_detr("DFineConfig", _hgnet, lqe_hidden_dim=8, depth_mult=0.34, max_num_bins=8),
        _HYBRID_LAYERS,
        loss_dtype=torch.float32,
        deformable=_DEFORMABLE_DECODER,
    ),
    "rf-detr": Family(
        "RfDetrForObjectDetection",
        _rf_detr,
        _VIT_DETR_LAYERS,
        deformable={"decoder_cross": "model.decoder.layers.0.cross_attn"},
    ),
    "lw-detr": Family(
        "LwDetrForObjectDetection",
        _lw_detr,
        _VIT_DETR_LAYERS,
        deformable={"decoder_cross": "model.decoder.layers.0.cross_attn"},
    ),
    "yolos": Family(
        "YolosForObjectDetection",
        _vit("YolosConfig", image_size=[32, 32], intermediate_size=32, num_detection_tokens=3),
        {"encoder_self": "vit.encoder.layer.{0}.attention.attention"},
        image_size=32,
        takes_pixel_mask=False,
    ),
    "vit": Family(
        "ViTForImageClassification",
        _vit("ViTConfig", intermediate_size=32),
        {"encoder_self": "vit.layers.{0}.attention"},
        **_VIT_INPUTS,
    ),
    "dinov2": Family(
        "Dinov2ForImageClassification",
        _vit("Dinov2Config", mlp_ratio=1),
        {"encoder_self": "dinov2.encoder.layer.{0}.attention"},
        **_VIT_INPUTS,
    ),
    "dinov2-registers": Family(
        "Dinov2WithRegistersForImageClassification",
        _vit("Dinov2WithRegistersConfig", mlp_ratio=1, num_register_tokens=2),
        {"encoder_self": "dinov2_with_registers.encoder.layer.{0}.attention"},
        **_VIT_INPUTS,
    ),
}
