"""What fits attn_kd into other libraries' models; each module imports its library when it is first
asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("attention_modules", "dab_detr", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
