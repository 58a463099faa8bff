"""Which backend serves a call, and why another one does not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import attn_kd
from attn_kd import InputError
from attn_kd.ops import backends, checks, extension, triton_installation
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import Call
from tests.conftest import HAS_GPU
from tests.ops.cases import Sizes, random_inputs
from tests.ops.conftest import require_backend

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)

# A call that every backend of a GPU serves.
SERVED = Call(GPU, (32, 32, 32), (torch.bfloat16,) * 3, "reverse_kl")


@pytest.fixture
def no_extension(monkeypatch):
    """An installation without the compiled extension, that has not yet said so."""
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing_reason", "the compiled extension is missing (no g++)")
    monkeypatch.setattr(backends, "_warned", set())


def forget() -> None:
    """Have the machine asked again."""
    backends._machine_lacks.cache_clear()
    backends._widest_on.cache_clear()


@pytest.fixture
def compiled_triton(monkeypatch) -> Iterator[None]:
    """Triton as it is without its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield
    forget()


Change = Callable[[object, str, Any], None]


@pytest.fixture
def pretended_gpu(monkeypatch, compiled_triton) -> Change:
    """A machine with a GPU and all it takes; the returned function changes what one is asked."""

    def answer(owner: object, question: str, value: Any) -> None:
        monkeypatch.setattr(owner, question, lambda *_: value)
        forget()

    answer(torch.cuda, "is_available", True)
    answer(torch.cuda, "current_device", 0)
    answer(torch.cuda, "get_device_capability", (9, 0))
    answer(torch.cuda, "get_device_name", "H100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    answer(triton_installation, "version", "3.6.0")
    answer(triton_installation, "missing_reason", None)
    answer(triton_installation, "driver_missing_reason", None)
    answer(backends, "_cuda_kernels_missing", None)
    monkeypatch.setattr(backends, "_warned", set())
    return answer


def assert_refused(name: str, call: Call, reason: str) -> None:
    """The backend is not chosen for the call where it is asked for; the error says why."""
    with pytest.raises(InputError, match=f"backend='{name}' cannot run here: {re.escape(reason)}"):
        backends.select_backend(name, call)


def test_every_backend_has_a_status_and_a_reason():
    statuses = attn_kd.available_backends()
    assert list(statuses) == ["cuda", "triton", "cpu", "reference"]
    assert all(isinstance(status.available, bool) and status.reason for status in statuses.values())


def test_the_reference_is_always_available():
    assert attn_kd.available_backends()["reference"].available


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name, compiled_triton):
    able, reason = attn_kd.available_backends()[name]
    assert not able
    with pytest.raises(InputError, match=f"backend='{name}' cannot run here: {re.escape(reason)}"):
        attn_kd.attention_kl(*random_inputs(Sizes()), backend=name)


def test_triton_is_preferred_on_a_gpu(pretended_gpu):
    assert backends.select_backend(None, Call(GPU, (256, 256, 256))) == "triton"
    assert attn_kd.available_backends()["triton"].available


def test_the_cuda_kernels_are_chosen_by_name_alone(pretended_gpu):
    assert backends.select_backend("cuda", SERVED) == "cuda"
    assert backends.select_backend(None, SERVED) == "triton"


NO_TRITON = (triton_installation, "missing_reason", "Triton cannot be imported (No module)")
NO_COMPILER = (triton_installation, "driver_missing_reason", "Triton cannot launch kernels (no cc)")
NO_KERNELS = (backends, "_cuda_kernels_missing", "the extension was built without CUDA: no nvcc")
OLD_GPU = (torch.cuda, "get_device_capability", (7, 5))


@pytest.mark.parametrize(
    ("name", "lack", "reason"),
    [
        pytest.param("triton", NO_TRITON, NO_TRITON[2], id="no triton"),
        pytest.param("triton", NO_COMPILER, NO_COMPILER[2], id="no compiler"),
        pytest.param("cuda", NO_KERNELS, NO_KERNELS[2], id="no cuda kernels"),
        *(
            pytest.param(name, OLD_GPU, "compute capability 7.5, needs 8.0", id=f"old gpu-{name}")
            for name in ("triton", "cuda")
        ),
    ],
)
def test_what_a_machine_with_a_gpu_lacks(pretended_gpu, name, lack, reason):
    pretended_gpu(*lack)
    assert attn_kd.available_backends()[name] == (False, reason)
    assert_refused(name, SERVED, reason)
    if name == "triton":  # and a call that names no backend is served all the same
        with pytest.warns(UserWarning, match=re.escape(f"slow reference backend: {reason}")):
            assert backends.select_backend(None, SERVED) == "reference"


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("release", "reason"), [(None, "torch is a CPU build"), ("13.0", "torch finds no GPU")]
)
def test_a_machine_without_a_gpu(pretended_gpu, monkeypatch, name, release, reason):
    pretended_gpu(torch.cuda, "is_available", False)
    monkeypatch.setattr(torch.version, "cuda", release)
    assert attn_kd.available_backends()[name] == (False, reason)
    assert_refused(name, SERVED._replace(device=CPU), reason)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_of_another_vendor(pretended_gpu, monkeypatch, name):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert attn_kd.available_backends()[name] == (False, "torch is not a CUDA build")
    assert_refused(name, SERVED, "torch is not a CUDA build")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_tensors_elsewhere_than_on_the_gpu(pretended_gpu, name):
    assert_refused(name, SERVED._replace(device=CPU), "the tensors are on cpu")


TRITON_REFUSES = {
    "float64": ({"dtypes": (torch.float64,) * 3}, "float64 is for the CPU"),
    "float64 teacher": (
        {"dtypes": (torch.float32, torch.float32, torch.float64)},
        "float64 is for the CPU",
    ),
    "head_dim": ({"head_dims": (257, 32, 32)}, "head_dim 257 exceeds 256"),
    "width of value": ({"head_dims": (32, 257, 32)}, "head_dim 257 exceeds 256"),
    "teacher's head_dim": ({"head_dims": (32, 32, 257)}, "head_dim 257 exceeds 256"),
    "divergence": ({"divergence": "hellinger"}, "no kernel for divergence='hellinger'"),
}


@pytest.mark.parametrize(("change", "reason"), TRITON_REFUSES.values(), ids=TRITON_REFUSES.keys())
def test_what_triton_cannot_do(pretended_gpu, change, reason):
    call = SERVED._replace(**change)
    assert_refused("triton", call, reason)
    with pytest.warns(UserWarning, match=re.escape(f"slow reference backend: {reason}")):
        assert backends.select_backend(None, call) == "reference"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        pytest.param({"dtype": torch.float64}, "float64 is for the CPU", id="float64"),
        pytest.param({"sizes": Sizes(Dt=257)}, "head_dim 257 exceeds 256", id="wide teacher"),
    ],
)
def test_a_call_that_triton_cannot_serve(tensors, reason):
    """From the tensors, on a machine where it runs."""
    require_backend("triton")
    inputs = random_inputs(**{"sizes": Sizes(), **tensors})
    with pytest.raises(InputError, match=f"backend='triton' cannot run here: {reason}"):
        attn_kd.attention_kl(*inputs, backend="triton")


def test_wide_heads_are_refused_where_shared_memory_is_little(pretended_gpu):
    wide = SERVED._replace(head_dims=(32, 256, 32))
    assert backends.select_backend("triton", wide) == "triton"
    pretended_gpu(torch.cuda, "get_device_capability", (8, 9))
    assert_refused("triton", wide, "head_dim 256 exceeds 128, what this GPU's shared memory holds")
    assert backends.select_backend("triton", wide._replace(head_dims=(32, 128, 32))) == "triton"


@pytest.mark.parametrize(
    "change",
    [
        *({"divergence": divergence} for divergence in checks.DIVERGENCES),
        {"head_reduction": "mean", "head_dims": (17, 5, 64)},
        {"mask_has_rows": True, "dropout_p": 0.1},
        {"group": 4, "dtypes": (torch.float16, torch.float32, torch.bfloat16)},
    ],
    ids=" ".join,
)
def test_what_triton_serves(pretended_gpu, change):
    assert backends.select_backend(None, SERVED._replace(**change)) == "triton"


CUDA_REFUSES = {
    "float32": ({"dtypes": (torch.float32,) * 3}, "needs bfloat16 or float16"),
    "float64": ({"dtypes": (torch.float64,) * 3}, "needs bfloat16 or float16"),
    "teacher's dtype": (
        {"dtypes": (torch.bfloat16, torch.float16, torch.float16)},
        "needs bfloat16 or float16, the same for student and teacher",
    ),
    "head_dim": ({"head_dims": (48, 48, 48)}, "needs a head_dim in (32, 64)"),
    "width of value": (
        {"head_dims": (32, 64, 32)},
        "needs a head_dim in (32, 64) and a value as wide, not 32 and 64",
    ),
    "no value": ({"head_dims": (32, 0, 32)}, "needs a head_dim in (32, 64) and a value as wide"),
    "teacher's head_dim": (
        {"head_dims": (32, 32, 64)},
        "needs a teacher of the student's head_dim 32, not 64",
    ),
    "divergence": ({"divergence": "js"}, "no kernel for divergence='js'"),
    "head_reduction": ({"head_reduction": "mean"}, "no kernel for head_reduction='mean'"),
    "dropout": ({"dropout_p": 0.1}, "no dropout"),
    "groups": ({"group": 4}, "no groups of teacher keys"),
    "mask of pairs": ({"mask_has_rows": True}, "no masks with a query dimension"),
}


@pytest.mark.parametrize(("change", "reason"), CUDA_REFUSES.values(), ids=CUDA_REFUSES.keys())
def test_what_the_cuda_kernels_cannot_do(pretended_gpu, change, reason):
    assert_refused("cuda", SERVED._replace(**change), reason)


@pytest.mark.parametrize(
    "change",
    [
        {"head_dims": (64, 64, 64)},
        {"dtypes": (torch.float16,) * 3},
        {"dtypes": (torch.float16,), "head_dims": (32, 32, 0), "divergence": None},
    ],
    ids=["head_dim 64", "float16", "attention alone"],
)
def test_what_the_cuda_kernels_can_do(pretended_gpu, change):
    assert backends.select_backend("cuda", SERVED._replace(**change)) == "cuda"


@pytest.mark.skipif(extension.module is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(("recorded", "said"), [("no nvcc", ": no nvcc"), (None, "")])
def test_an_extension_without_cuda_says_why(monkeypatch, recorded, said):
    kernels = "_dispatch_has_kernel_for_dispatch_key"
    monkeypatch.setattr(torch._C, kernels, lambda operator, key: False)
    monkeypatch.setattr(backends, "missing_cuda_reason", lambda: recorded)
    reason = attn_kd.available_backends()["cuda"].reason
    assert reason == f"the extension was built without CUDA{said}"


@pytest.mark.parametrize(
    ("mask", "has_rows"),
    [
        pytest.param(torch.ones(29), False, id="[Lk]"),
        pytest.param(torch.ones(2, 1, 1, 29), False, id="[B, 1, 1, Lk]"),
        pytest.param(torch.ones(2, 1, 1, 29).expand(2, 3, 13, 29), False, id="expanded"),
        pytest.param(torch.ones(13, 29), True, id="[Lq, Lk]"),
        pytest.param(torch.ones(2, 1, 13, 29), True, id="[B, 1, Lq, Lk]"),
        pytest.param(torch.ones(13, 1), True, id="[Lq, 1]"),
    ],
)
@pytest.mark.parametrize("teacher", [True, False], ids=["with a teacher", "without"])
def test_a_mask_has_rows_where_its_last_but_one_size_says_so(mask, has_rows, teacher):
    inputs = random_inputs(Sizes())[: 5 if teacher else 3]
    operands = Operands(*inputs, attn_mask=mask)
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
