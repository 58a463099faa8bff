"""Shared arguments: what is accepted, and what is refused with which words."""

from __future__ import annotations

import argparse

import pytest
import torch

from attn_kd.cli import _arguments
from attn_kd.errors import InputError


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("positive_int", "1", 1),
        ("whole_number", "0", 0),
        ("positive_float", "1e-4", 1e-4),
        ("fraction", "0", 0.0),
        ("fraction", "1", 1.0),
    ],
)
def test_number_is_read(kind, text, value):
    assert getattr(_arguments, kind)(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("positive_int", "0"),
        ("positive_int", "1.5"),
        ("whole_number", "-1"),
        ("positive_float", "0"),
        ("positive_float", "inf"),
        ("fraction", "1.01"),
        ("fraction", "nan"),
        ("fraction", "half"),
    ],
)
def test_number_out_of_range_is_refused_by_name(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}'"):
        getattr(_arguments, kind)(text)


def test_cpu_is_a_device():
    assert _arguments.resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99"])
def test_device_that_is_not_here_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"'{name}'"):
        _arguments.resolve_device(name)


def test_writable_folder_is_not_made_yet(tmp_path):
    assert _arguments.require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/out", "dangling"])
def test_what_takes_no_files_is_refused_by_name(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"cannot write to .*{name}"):
        _arguments.require_writable(tmp_path / name)
