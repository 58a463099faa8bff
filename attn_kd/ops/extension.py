"""The compiled extension, if this installation has one, and otherwise the reason why not."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  # libtorch must be loaded before the extension that links against it


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("attn_kd._C"), None
    except ModuleNotFoundError as error:
        if error.name != "attn_kd._C":
            raise
        return None, "the compiled extension was not built when attn_kd was installed"
    except ImportError as error:  # built for another torch or another libc
        return None, f"the compiled extension does not load: {error}"


module, missing_reason = _load()
