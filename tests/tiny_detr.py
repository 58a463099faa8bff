"""A DETR small enough for a test to run in milliseconds, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, PreTrainedModel, ResNetConfig

IMAGE_SIZE = 64
STRIDE = 8  # of the backbone below: 64 x 64 pixels become 8 x 8 = 64 tokens


def tiny_detr(*, seed: int = 0, heads: int = 4, **fields: Any) -> DetrForObjectDetection:
    """Build a DETR of 2 encoder layers and 1 decoder layer whose maps are far from uniform.

    `fields` override those of DetrConfig. Nothing is random at run time: there is no dropout.
    """
    torch.manual_seed(seed)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 3}
    layers = {"encoder_layers": 2, "decoder_layers": 1}
    number = {"num_labels": 2, "encoder_attention_heads": heads, "decoder_attention_heads": heads}
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        **{**sizes, **layers, **number, "dropout": 0.0, **fields},
    )
    model = DetrForObjectDetection(config)
    for part in (model.model.encoder, model.model.decoder):
        for name, parameter in part.named_parameters():
            if parameter.dim() > 1:
                # At 0.02, transformers' own scale, every map is uniform and every divergence 0.
                torch.nn.init.normal_(parameter, std=0.5 if "_proj" in name else 0.2)
    torch.nn.init.normal_(model.model.query_position_embeddings.weight)
    # transformers freezes part of the backbone.
    return model.eval().requires_grad_(True)


def tiny_batch(
    *, padded: bool = True, labels: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """Two images of 64 x 64; padded ones have 8 x 5 and 6 x 8 real tokens of 8 x 8."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    batch: dict[str, Any] = {
        "pixel_values": torch.randn(size, generator=generator, dtype=dtype),
        "pixel_mask": torch.ones(2, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long),
    }
    if padded:
        batch["pixel_mask"][0, :, 5 * STRIDE :] = 0
        batch["pixel_mask"][1, 6 * STRIDE :, :] = 0
        batch["pixel_values"] *= batch["pixel_mask"][:, None]
    if labels:
        box = torch.tensor([[0.5, 0.4, 0.2, 0.3]], dtype=dtype)
        batch["labels"] = [
            {"class_labels": torch.tensor([1]), "boxes": box},
            {"class_labels": torch.empty(0, dtype=torch.long), "boxes": box[:0]},
        ]
    return batch


def checkpoint_activations(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Turn on activation checkpointing, with options of torch.utils.checkpoint.checkpoint."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # its name in transformers 5.17
        model.gradient_checkpointing_enable(options)


def token_mask(batch: dict[str, Any]) -> Tensor:
    """Return which of the [B, 64] encoder tokens are real, as DETR derives it."""
    mask = batch["pixel_mask"][:, ::STRIDE, ::STRIDE]
    return mask.flatten(1).bool()
