"""Which backend serves a call, and why another one does not."""

from __future__ import annotations

import re
import sys
import warnings

import pytest
import torch

import attn_kd
from attn_kd import InputError
from attn_kd.ops import backends, checks, extension
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import Call
from tests.conftest import HAS_GPU
from tests.ops.cases import Sizes, random_inputs

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


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


@pytest.fixture
def compiled_triton(monkeypatch):
    """Triton as it is without its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def pretended_gpu(monkeypatch, compiled_triton):
    """A machine whose GPU has the compute capability that the returned function is given."""
    facts = {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "H100"}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    monkeypatch.setattr(backends, "_cuda_kernels_missing", lambda: None)

    def of_capability(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (major, minor))

    return of_capability


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name, compiled_triton):
    able, reason = attn_kd.available_backends()[name]
    assert not able
    with pytest.raises(InputError, match=f"backend='{name}' cannot run here: {re.escape(reason)}"):
        attn_kd.attention_kl(*random_inputs(Sizes()), backend=name)


def test_without_triton_its_import_error_is_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    able, reason = attn_kd.available_backends()["triton"]
    assert not able and "import of triton halted" in reason
    with pytest.raises(InputError, match="import of triton halted"):
        backends.select_backend("triton", Call(CPU, (8, 8, 8)))


def test_triton_is_preferred_on_a_gpu(pretended_gpu):
    assert backends.select_backend(None, Call(GPU, (256, 256, 256))) == "triton"


def test_an_old_gpu_is_refused_with_its_compute_capability(pretended_gpu):
    pretended_gpu(7, 5)
    for name in ("triton", "cuda"):
        reason = attn_kd.available_backends()[name].reason
        assert reason == "compute capability 7.5, needs 8.0"
        with pytest.raises(InputError, match=re.escape(reason)):
            backends.select_backend(name, Call(GPU, (32, 32, 32)))


def test_tensors_of_a_cpu_are_not_for_triton_where_there_is_a_gpu(pretended_gpu):
    with pytest.raises(InputError, match="the tensors are on cpu"):
        backends.select_backend("triton", Call(CPU, (32, 32, 32)))


def test_float64_is_not_for_triton(pretended_gpu):
    for dtypes in ((torch.float64,), (torch.float32, torch.float32, torch.float64)):
        with pytest.raises(InputError, match="float64 is for the CPU"):
            backends.select_backend("triton", Call(GPU, (8, 8, 8), dtypes))


SERVED = Call(GPU, (32, 32, 32), (torch.bfloat16,) * 3, "reverse_kl")


def test_a_divergence_without_a_triton_kernel_is_refused_by_name(pretended_gpu):
    call = Call(GPU, (32, 32, 32), divergence="total_variation")
    with pytest.raises(InputError, match="no kernel for divergence='total_variation'"):
        backends.select_backend("triton", call)


def test_wide_heads_are_refused_where_shared_memory_is_little(pretended_gpu):
    wide = Call(GPU, (256, 256, 256))
    pretended_gpu(8, 9)
    assert backends.select_backend("triton", wide._replace(head_dims=(128, 128, 128))) == "triton"
    with pytest.raises(InputError, match="head_dim 256 exceeds 128"):
        backends.select_backend("triton", wide)


def test_triton_has_a_kernel_for_every_divergence(pretended_gpu):
    for divergence in checks.DIVERGENCES:
        call = Call(GPU, (32, 32, 32), divergence=divergence)
        assert backends.select_backend(None, call) == "triton"


def test_the_cuda_kernels_are_chosen_by_name_alone(pretended_gpu):
    assert backends.select_backend("cuda", SERVED) == "cuda"
    assert backends.select_backend(None, SERVED) == "triton"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtypes": (torch.float32,) * 3}, "bfloat16 or float16"),
        ({"dtypes": (torch.bfloat16, torch.float16, torch.float16)}, "the same for student"),
        ({"head_dims": (48, 48, 48)}, "head_dim"),
        ({"head_dims": (32, 0, 32)}, "a value as wide"),
        ({"head_dims": (32, 32, 64)}, "a teacher of the student's head_dim"),
        ({"divergence": "js"}, "divergence='js'"),
        ({"head_reduction": "mean"}, "head_reduction='mean'"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"group": 4}, "groups"),
        ({"mask_has_rows": True}, "query dimension"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_cuda_kernels_cannot_do(pretended_gpu, change, reason):
    with pytest.raises(InputError, match=reason):
        backends.select_backend("cuda", SERVED._replace(**change))


@pytest.mark.skipif(extension.module is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(("recorded", "said"), [("no nvcc", ": no nvcc"), (None, "")])
def test_an_extension_without_cuda_says_why(monkeypatch, recorded, said):
    kernels = "_dispatch_has_kernel_for_dispatch_key"
    monkeypatch.setattr(torch._C, kernels, lambda operator, key: False)
    monkeypatch.setattr(backends, "missing_cuda_reason", lambda: recorded)
    reason = attn_kd.available_backends()["cuda"].reason
    assert reason == f"the extension was built without CUDA{said}"


@pytest.mark.parametrize(
    ("shape", "has_rows"), [((29,), False), ((2, 1, 1, 29), False), ((13, 29), True)]
)
def test_a_mask_has_rows_where_its_last_but_one_size_says_so(shape, has_rows):
    operands = Operands(*random_inputs(Sizes()), attn_mask=torch.ones(shape))
    assert backends.facts_of(operands, Options()).mask_has_rows == has_rows


def test_the_kernels_are_preferred_on_a_cpu(cpu_backend):
    assert backends.select_backend(None, Call(CPU, (256, 256, 256))) == "cpu"


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
        backends.select_backend("cpu", Call(meta, (8,)))
    with pytest.warns(UserWarning, match="the tensors are on meta"):
        assert backends.select_backend(None, Call(meta, (8,))) == "reference"
