"""Attention distillation by materialised maps: what the distiller must agree with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_detr import token_mask


def attention_map(model: nn.Module, batch: dict[str, Any], kind: str, layer: int) -> Tensor:
    """Return one map [B, H, Lq, Lk] of a DETR with eager attention; differentiable.

    `kind` is "encoder", "decoder" or "cross".
    """
    model.set_attn_implementation("eager")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model(**inputs, output_attentions=True)
    return getattr(output, f"{kind}_attentions")[layer]


def explicit_kl(
    student_map: Tensor,  # [B, H, Lq, Lk]
    teacher_map: Tensor,  # [B, H, Lq, Lk]
    *,
    rows: Tensor | None = None,  # bool [B, Lq]; None for all
    divergence: str = "reverse_kl",
) -> Tensor:
    """Return the mean divergence over heads and the rows that count, from the definition."""
    a, b = student_map, teacher_map.detach()
    if divergence == "forward_kl":
        a, b = b, a
    a, b = (whole.to(torch.promote_types(whole.dtype, torch.float32)) for whole in (a, b))
    tiny = torch.finfo(a.dtype).tiny
    log_ratio = a.clamp_min(tiny).log() - b.clamp_min(tiny).log()
    terms = torch.where((a > 0) & (b > 0), a * log_ratio, 0)
    kl = terms.sum(-1).mean(1)  # [B, Lq]
    return kl.mean() if rows is None else kl[rows].mean()


def explicit_encoder_kl(
    student: nn.Module,
    teacher: nn.Module,
    batch: dict[str, Any],
    *,
    student_layer: int = -1,
    teacher_layer: int = -1,
    divergence: str = "reverse_kl",
) -> Tensor:
    """`explicit_kl` of two encoder layers over the rows that are not padding."""
    student_map = attention_map(student, batch, "encoder", student_layer)
    with torch.no_grad():
        teacher_map = attention_map(teacher, batch, "encoder", teacher_layer)
    return explicit_kl(student_map, teacher_map, rows=token_mask(batch), divergence=divergence)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter by name, zero where the loss does not depend on it."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))
