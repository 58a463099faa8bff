"""Autocast in Python, for the reference backend and tracing; csrc/autocast.cpp is the rest."""

from __future__ import annotations

import torch

from attn_kd.ops.arguments import Operands


def is_enabled(device: torch.device) -> bool:
    """Return whether autocast is on for the device's type."""
    return _is_available(device.type) and torch.is_autocast_enabled(device.type)


def _is_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# What torch.compiler.assume_constant_result does, but for importing the compiler: that of torch
# 2.11 cannot trace the question, and shall ask it once.
_is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
