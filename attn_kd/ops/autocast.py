"""Autocast in Python, for the reference backend and tracing; csrc/autocast.cpp is the rest."""

from __future__ import annotations

import torch

from attn_kd.ops.arguments import Operands


def is_enabled(device: torch.device) -> bool:
    """Return whether autocast is on for the device's type."""
    available = torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def cast_student(operands: Operands) -> Operands:
    """Cast the student's tensors as autocast casts those of scaled_dot_product_attention."""
    device = operands.query.device
    if not is_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device.type)
    query, key, value = (
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
        for t in operands[:3]
    )
    return operands._replace(query=query, key=key, value=value)
