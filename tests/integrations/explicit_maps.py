"""Eager attention that keeps its maps: what the fused layers of any family must agree with.

transformers' own eager functions will not do: ViT's computes its softmax in float32 whatever it is
given, and some models do not return their maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from attn_kd.integrations.attention_modules import attention_modules

_NAME = "explicit_maps"
HIDDEN = -1e30


@contextmanager
def explicit_maps(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Make `model` compute explicit attention; yield the logs of its maps by path, filled in.

    Maps are [B, H, Lq, Lk], every step has the dtype of the model, and gradients flow through
    them. What a mask hides is below `HIDDEN`.
    """
    maps: dict[str, Tensor] = {}
    paths = {module: path for path, module in attention_modules(model).items()}

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = scale * query @ key.transpose(-1, -2)
        if attention_mask is not None:
            logits = logits + attention_mask
        log_map = maps[paths[module]] = logits.log_softmax(-1)
        return (log_map.exp() @ value).transpose(1, 2), log_map.exp()

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    use(model, _NAME)
    try:
        yield maps
    finally:
        use(model, "sdpa")
        del AttentionInterface._global_mapping[_NAME]
        del AttentionMaskInterface._global_mapping[_NAME]


def use(model: nn.Module, implementation: str) -> nn.Module:
    """Set the implementation of every part of `model` that has attention.

    Convolutional backbones refuse "sdpa", even from their owner's setter.
    """
    names = {"": implementation}
    if any("backbone" in path for path in attention_modules(model)):
        names["backbone_config"] = implementation
    model.set_attn_implementation(names)
    configurations = [module.config for module in attention_modules(model).values()]
    assert all(config._attn_implementation == implementation for config in configurations)
    return model


def divergence(
    student_log_map: Tensor,  # [B, H, Lq, Lk]
    teacher_log_map: Tensor,  # [B, H, Lq, Lk]
    *,
    self_attention: bool,
) -> Tensor:
    """Return the mean KL(student || teacher) over heads and the rows that are not padding.

    Padding is what no row may attend to; in self-attention it has rows of its own.
    """
    visible = student_log_map > HIDDEN
    log_ratio = torch.where(visible, student_log_map - teacher_log_map.detach(), 0)
    kl = (student_log_map.exp() * log_ratio).sum(-1).mean(1)  # [B, Lq]
    return kl[visible.any(-2).all(1)].mean() if self_attention else kl.mean()
