"""Attention distillation for detection transformers.

Softmax attention and its divergence from a teacher's attention in one sweep over the keys, and
what a practitioner needs around it. Importing the package loads torch and the operators alone;
everything else is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from attn_kd.errors import InputError
from attn_kd.ops import (
    AttentionKLDivOutput,
    AttentionKLOutput,
    AttentionOutput,
    BackendStatus,
    FusedAttentionKL,
    attention,
    attention_kl,
    attention_kl_div,
    available_backends,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionDistiller",
    "AttentionKLDivOutput",
    "AttentionKLOutput",
    "AttentionOutput",
    "BackendStatus",
    "FusedAttentionKL",
    "InputError",
    "attention",
    "attention_kl",
    "attention_kl_div",
    "available_backends",
]

_SUBPACKAGES = (
    "data",
    "distill",
    "inference",
    "integrations",
    "models",
    "nn",
    "report",
    "training",
)


def __getattr__(name: str) -> Any:
    if name == "AttentionDistiller":
        return importlib.import_module("attn_kd.distill").AttentionDistiller
    if name in _SUBPACKAGES:
        return importlib.import_module(f"attn_kd.{name}")
    raise AttributeError(f"module 'attn_kd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
