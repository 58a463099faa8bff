"""Named sizes of detector: everything of a DETR but its number of layers, queries and classes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attn_kd.errors import InputError


@dataclass(frozen=True)
class Preset:
    """A size of detector.

    Attributes:
        name: what :func:`attn_kd.models.build_detr` is called with.
        summary: one line for help texts.
        backbone: arguments of transformers' ``ResNetConfig``; the last stage feeds the transformer.
        transformer: arguments of transformers' ``DetrConfig``.
        image_size: ``size`` of transformers' ``DetrImageProcessor``, in pixels.
        num_queries: object queries, i.e. the most objects found in an image.
        trainable_batch_norm: whether the backbone's batch norm learns and tracks statistics. DETR
            freezes it, which is right for pretrained weights and hopeless without them.
    """

    name: str
    summary: str
    backbone: Mapping[str, Any]
    image_size: Mapping[str, int]
    num_queries: int
    transformer: Mapping[str, Any] = field(default_factory=dict)
    trainable_batch_norm: bool = False

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the largest image the processor makes, in pixels."""
        size = self.image_size
        return (
            size.get("height", size.get("max_height", 0)),
            size.get("width", size.get("max_width", 0)),
        )


# Rubin et al. 2021: DETR on ResNet-50, d_model 256, 8 heads, one query, one class. The input size
# follows from the multiply-accumulates the paper gives (13 x 13 positions at stride 32).
DETR_R50 = Preset(
    name="detr-r50",
    summary="the paper's size: ResNet-50, d_model 256, 8 heads, images up to 416 x 416",
    backbone={"depths": (3, 4, 6, 3), "hidden_sizes": (256, 512, 1024, 2048)},
    transformer={"d_model": 256, "auxiliary_loss": True},
    image_size={"max_height": 416, "max_width": 416},
    num_queries=1,
)

# For training from scratch on a CPU. Attention in DETR has positions in queries and keys only; its
# values know where they are by the zero padding that the backbone has seen, so the blocks of the
# later, cheaper stages are there for a receptive field as wide as the image. Dropout is off: so
# small a transformer underfits before it overfits.
DETR_TINY = Preset(
    name="detr-tiny",
    summary="for CPUs, trained from scratch: narrow ResNet at stride 16, d_model 64, 128 x 128",
    backbone={
        "embedding_size": 16,
        "hidden_sizes": (32, 64, 128),
        "depths": (1, 2, 3),
        "layer_type": "basic",
    },
    transformer={
        "d_model": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "dropout": 0.0,
        "auxiliary_loss": True,
    },
    image_size={"height": 128, "width": 128},
    num_queries=10,
    trainable_batch_norm=True,
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (DETR_R50, DETR_TINY)}


def get_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(str(name), PRESETS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}{hint}")
