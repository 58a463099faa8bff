"""Which backend serves a call, and why another one does not."""

from __future__ import annotations

import warnings

import pytest
import torch

import attn_kd
from attn_kd import InputError
from attn_kd.ops import backends, extension
from tests.ops.cases import Sizes, random_inputs

CPU = torch.device("cpu")


@pytest.fixture
def no_extension(monkeypatch):
    """An installation without the compiled extension, that has not yet said so."""
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing_reason", "the compiled extension is missing (no g++)")
    monkeypatch.setattr(backends, "_warned", set())


def test_every_backend_has_a_status_and_a_reason():
    statuses = attn_kd.available_backends()
    assert list(statuses) == ["cuda", "triton", "cpu", "reference"]
    assert all(isinstance(status.available, bool) and status.reason for status in statuses.values())


def test_the_reference_is_always_available():
    assert attn_kd.available_backends()["reference"].available


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name):
    reason = attn_kd.available_backends()[name].reason
    with pytest.raises(InputError, match=f"backend='{name}' cannot run here: {reason}"):
        attn_kd.attention_kl(*random_inputs(Sizes()), backend=name)


def test_the_kernels_are_preferred_on_a_cpu(cpu_backend):
    assert backends.select_backend(None, CPU, (256, 256, 256)) == "cpu"


@pytest.mark.parametrize("wide", ["D", "Dv", "Dt"])
def test_wide_heads_fall_back_to_the_reference(cpu_backend, monkeypatch, wide):
    monkeypatch.setattr(backends, "_warned", set())
    inputs = random_inputs(Sizes(**{wide: 257}))
    with pytest.warns(UserWarning, match="reference backend: head_dim 257 exceeds 256"):
        out = attn_kd.attention_kl(*inputs)
    expected = attn_kd.attention_kl(*inputs, backend="reference")
    assert torch.equal(out.kl, expected.kl)
    with pytest.raises(InputError, match="head_dim 257 exceeds 256"):
        attn_kd.attention_kl(*inputs, backend="cpu")


def test_without_the_extension_the_reference_serves_and_says_so_once(no_extension):
    inputs = random_inputs(Sizes())
    with pytest.warns(UserWarning, match=r"slow reference backend: .*no g\+\+"):
        attn_kd.attention_kl(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_kd.attention_kl(*inputs)


def test_without_the_extension_the_kernels_are_refused(no_extension):
    assert not attn_kd.available_backends()["cpu"].available
    with pytest.raises(InputError, match=r"cannot run here: .*no g\+\+"):
        attn_kd.attention_kl(*random_inputs(Sizes()), backend="cpu")


def test_asking_for_the_reference_is_not_warned_about(no_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_kd.attention_kl(*random_inputs(Sizes()), backend="reference")


def test_tensors_elsewhere_are_not_for_the_cpu_kernels(cpu_backend, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    meta = torch.device("meta")
    with pytest.raises(InputError, match="the tensors are on meta"):
        backends.select_backend("cpu", meta, (8,))
    with pytest.warns(UserWarning, match="the tensors are on meta"):
        assert backends.select_backend(None, meta, (8,)) == "reference"
