"""The record of the build: read whatever its state, and what it says about the running torch."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from attn_kd import _build
from attn_kd._build import (
    BuildRecord,
    build_record,
    missing_cuda_reason,
    missing_extension_reason,
    torch_mismatch,
)
from attn_kd.ops import extension

BUILT = {"extension": True, "reason": None, "torch": "2.13.0+cpu"}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Put a text in the place of the record."""

    def write(text: str) -> None:
        path = tmp_path / "_build.json"
        path.write_text(text)
        monkeypatch.setattr(_build, "RECORD", path)

    return write


def test_record_is_read(record):
    record(json.dumps(BUILT))
    assert build_record() == BuildRecord(True, None, "2.13.0+cpu")


def test_record_says_why_there_is_no_cuda(record):
    record(json.dumps({**BUILT, "cuda": "no nvcc"}))
    assert build_record() == BuildRecord(True, None, "2.13.0+cpu", "no nvcc")
    assert missing_cuda_reason() == "no nvcc"


@pytest.mark.parametrize("text", [json.dumps(BUILT), json.dumps({**BUILT, "cuda": None}), ""])
def test_record_that_says_nothing_of_cuda(record, text):
    record(text)
    assert missing_cuda_reason() is None


def test_facts_of_a_newer_version_are_passed_over(record):
    record(json.dumps({**BUILT, "compiler": "g++ 15"}))
    assert build_record() == BuildRecord(True, None, "2.13.0+cpu")


@pytest.mark.parametrize(
    "text",
    ["", '{"extension": tr', "[]", "null", '{"extension": true}'],
    ids=["empty", "truncated", "list", "null", "incomplete"],
)
def test_damaged_record_counts_as_none(record, text):
    record(text)
    assert build_record() is None
    assert torch_mismatch("2.13.0") is None
    assert "was not built" in missing_extension_reason()


@pytest.mark.parametrize(
    ("built", "running"),
    [
        ("2.13.0", "2.13.0"),
        ("2.13.0", "2.13.1"),
        ("2.13.0+cpu", "2.13.0+cu130"),
        ("2.14.0.dev20261101+cpu", "2.14.0.dev20261101+cpu"),
        ("2.14.0a0+git0123abc", "2.14.0a0+git0123abc"),
    ],
)
def test_extension_may_be_loaded_into(record, built, running):
    record(json.dumps({**BUILT, "torch": built}))
    assert torch_mismatch(running) is None


@pytest.mark.parametrize(
    ("built", "running"),
    [
        ("2.12.1", "2.13.0"),
        ("2.1.0", "2.13.0"),
        ("2.13.0", "3.13.0"),
        ("2.14.0.dev20261101+cpu", "2.14.0.dev20261102+cpu"),
        ("2.14.0.dev20261101+cpu", "2.14.0"),
        ("2.14.0a0+git0123abc", "2.14.0a0+git4567def"),
    ],
)
def test_extension_must_not_be_loaded_into(record, built, running):
    record(json.dumps({**BUILT, "torch": built}))
    reason = torch_mismatch(running)
    assert f"built for torch {built}, this is {running}" in reason


def test_extension_of_another_torch_is_not_even_imported(record, monkeypatch):
    record(json.dumps({**BUILT, "torch": "1.0.0"}))
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    module, reason = extension._load()
    assert module is None
    assert reason.startswith("the compiled extension is not loaded (it was built for torch 1.0.0")
    assert torch.__version__ in reason


def test_reason_of_a_failed_build_is_not_hidden_by_its_torch(record):
    record(json.dumps({"extension": False, "reason": "no C++ compiler", "torch": "1.0.0"}))
    assert torch_mismatch(torch.__version__) is None
    assert missing_extension_reason() == "no C++ compiler"
