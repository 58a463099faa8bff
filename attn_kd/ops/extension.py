"""The compiled extension, if this installation has one, and otherwise the reason why not."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # libtorch must be loaded before the extension that links against it

from attn_kd._build import build_record, missing_extension_reason, torch_mismatch


def _load() -> tuple[ModuleType | None, str | None]:
    mismatch = torch_mismatch(torch.__version__)
    if mismatch is not None:  # before the import, which might succeed
        return None, f"the compiled extension is not loaded ({mismatch})"
    try:
        return importlib.import_module("attn_kd._C"), None
    except ModuleNotFoundError as error:
        if error.name != "attn_kd._C":
            raise
        return None, f"the compiled extension is missing ({missing_extension_reason()})"
    except ImportError as error:  # built with another libstdc++ or libc, for example
        record = build_record()
        built_for = (
            f"it was built for torch {record.torch}, this is {torch.__version__}; "
            if record
            else ""
        )
        return None, f"the compiled extension does not load ({built_for}{error})"


module, missing_reason = _load()
