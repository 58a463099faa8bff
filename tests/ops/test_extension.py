"""Loading the compiled extension, and what is said where that fails."""

from __future__ import annotations

import importlib
import sys

import pytest

from attn_kd.ops import extension


def test_either_a_module_or_a_reason():
    assert (extension.module is None) == bool(extension.missing_reason)


def test_missing_module_gives_the_reason_of_the_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "attn_kd._C", None)  # what an import statement takes as absent
    module, reason = extension._load()
    assert module is None
    assert reason.startswith("the compiled extension is missing (")


def test_module_that_does_not_load_gives_the_linker_s_message(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: _ZN2at", name=name)

    monkeypatch.setattr(importlib, "import_module", fail)
    module, reason = extension._load()
    assert module is None
    assert "does not load" in reason and "undefined symbol: _ZN2at" in reason


def test_another_missing_module_is_a_defect_and_is_raised(monkeypatch):
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        extension._load()
