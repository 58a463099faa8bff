"""One place that decides which backend serves a call, and can say why each other one cannot."""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

import torch

from attn_kd._build import missing_cuda_reason
from attn_kd.errors import InputError
from attn_kd.ops import extension, triton_installation
from attn_kd.ops.arguments import Operands, Options

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the preferred ones first
MAX_HEAD_DIM = 256  # of the compiled and the Triton kernels; the reference backend has no limit

# What kernels/triton/separable.py has.
_TRITON_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "mse")
# Consumer GPUs have 100 KiB of shared memory a multiprocessor; tiles of wider heads take 116.
_LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
_LITTLE_SHARED_WIDTH = 128
# What the CUDA C++ kernels are compiled for.
_CUDA_HEAD_DIMS = (32, 64)
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # Ampere


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and if not, why."""

    available: bool
    reason: str


class Call(NamedTuple):
    """The facts of a call that decide which backends can serve it."""

    device: torch.device
    head_dims: tuple[int, ...]  # D, Dv, Dt; 0 for what is not there
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # query's, teacher_query's, teacher_key's
    divergence: str | None = None  # None without a teacher
    head_reduction: str = "none"
    dropout_p: float = 0.0
    group: int = 1  # the teacher's keys to each of the student's
    mask_has_rows: bool = False  # a query dimension that is not expanded


def facts_of(operands: Operands, options: Options) -> Call:
    """Return what of a call decides its backend."""
    query, key, value, teacher_query, teacher_key, _, mask, _ = operands
    head_dims = (query.shape[3], value.shape[3])
    mask_has_rows = (
        mask is not None and mask.dim() >= 2 and mask.shape[-2] != 1 and mask.stride(-2) != 0
    )
    if teacher_query is None or teacher_key is None:
        return Call(
            query.device,
            (*head_dims, 0),
            (query.dtype,),
            dropout_p=options.dropout_p,
            mask_has_rows=mask_has_rows,
        )
    return Call(
        query.device,
        (*head_dims, teacher_query.shape[3]),
        (query.dtype, teacher_query.dtype, teacher_key.dtype),
        options.divergence,
        options.head_reduction,
        options.dropout_p,
        teacher_key.shape[2] // key.shape[2],
        mask_has_rows,
    )


def available_backends() -> dict[str, BackendStatus]:
    """Return the status of every backend by name, the preferred ones first.

    ``status.reason`` says what a backend needs when ``status.available`` is false. What a backend
    that is available cannot do (a dtype, a head_dim) it says when it is asked to.
    """
    statuses = {
        "cuda": _cuda_status(),
        "triton": _triton_status(),
        "cpu": _cpu_status(),
        "reference": BackendStatus(True, "plain torch, any device; slower than the kernels"),
    }
    return {name: statuses[name] for name in BACKENDS}


def _cpu_status() -> BackendStatus:
    if extension.module is None:
        return BackendStatus(False, str(extension.missing_reason))
    return BackendStatus(True, f"compiled kernels, {extension.module.instruction_set()}")


def _triton_status() -> BackendStatus:
    reason = triton_installation.missing_reason()
    if reason is not None:
        return BackendStatus(False, reason)
    triton = f"Triton {triton_installation.version()}"
    if interprets_triton():
        return BackendStatus(True, f"{triton}, interpreted on the CPU: for tests")
    reason = _gpu_missing() or triton_installation.driver_missing_reason()
    if reason is not None:
        return BackendStatus(False, reason)
    return BackendStatus(True, f"{triton}, {torch.cuda.get_device_name()}")


def _cuda_status() -> BackendStatus:
    reason = _cuda_kernels_missing() or _gpu_missing()
    if reason is not None:
        return BackendStatus(False, reason)
    return BackendStatus(True, f"by name alone: never run on a GPU; {torch.cuda.get_device_name()}")


def select_backend(requested: str | None, call: Call) -> str:
    """Return the name of the backend that will run a call.

    Without a request that is "triton" for CUDA tensors and "cpu" for others, or the reference where
    these refuse. "cuda" is chosen by name alone: its kernels have not been validated on a GPU.

    Raises:
        InputError: `requested` is unknown, or cannot run here or with these inputs.
    """
    if requested is None:
        preferred = "triton" if call.device.type == "cuda" else "cpu"
        refusal = _refusal(preferred, call)
        if refusal is None:
            return preferred
        _warn_slow_once(refusal)
        return "reference"
    # Not available_backends(): what it asks the extension cannot be traced by torch.compile.
    if requested not in BACKENDS:
        raise InputError(f"backend={requested!r} is unknown; expected one of {BACKENDS}")
    refusal = _refusal(requested, call)
    if refusal is not None:
        raise InputError(f"backend={requested!r} cannot run here: {refusal}")
    return requested


def _refusal(name: str, call: Call) -> str | None:
    if name == "reference":
        return None
    if name == "cpu":
        return _cpu_refusal(call)
    machine = machine_refusal(name, call.device.type, call.device.index)
    if machine is not None:
        return machine
    return _triton_refusal(call) if name == "triton" else _cuda_refusal(call)


def _cpu_refusal(call: Call) -> str | None:
    if extension.module is None:
        return extension.missing_reason
    if call.device.type != "cpu":
        return f"the tensors are on {call.device}"
    return _width_refusal(call)


def _triton_refusal(call: Call) -> str | None:
    if torch.float64 in call.dtypes:
        return "float64 is for the CPU"
    if call.divergence not in (None, *_TRITON_DIVERGENCES):
        return f"no kernel for divergence={call.divergence!r}"
    widest, limit = max(call.head_dims), triton_widest(call.device)
    if limit < widest <= MAX_HEAD_DIM:
        return f"head_dim {widest} exceeds {limit}, what this GPU's shared memory holds"
    return _width_refusal(call)


def _width_refusal(call: Call) -> str | None:
    if max(call.head_dims) > MAX_HEAD_DIM:
        return f"head_dim {max(call.head_dims)} exceeds {MAX_HEAD_DIM}"
    return None


def _cuda_refusal(call: Call) -> str | None:
    dtype = call.dtypes[0]
    head_dim, value_dim, teacher_dim = call.head_dims
    if dtype not in _CUDA_DTYPES or any(other != dtype for other in call.dtypes):
        return "needs bfloat16 or float16, the same for student and teacher"
    if head_dim not in _CUDA_HEAD_DIMS or value_dim != head_dim:
        return (
            f"needs a head_dim in {_CUDA_HEAD_DIMS} and a value as wide, "
            f"not {head_dim} and {value_dim}"
        )
    if call.divergence is not None and teacher_dim != head_dim:
        return f"needs a teacher of the student's head_dim {head_dim}, not {teacher_dim}"
    if call.divergence not in (None, "reverse_kl"):
        return f"no kernel for divergence={call.divergence!r}"
    if call.head_reduction != "none":
        return f"no kernel for head_reduction={call.head_reduction!r}"
    if call.dropout_p > 0.0:
        return "no dropout"
    if call.group != 1:
        return "no groups of teacher keys"
    if call.mask_has_rows:
        return "no masks with a query dimension"
    return None


def machine_refusal(name: str, device_type: str, index: int | None) -> str | None:
    """Return why a GPU backend cannot serve any tensor on that device; None where it can."""
    return _machine_lacks(name, device_type, index)


def triton_widest(device: torch.device) -> int:
    """Return the largest head_dim for which the device's shared memory has room."""
    return _widest_on(device)


# What torch.compiler.assume_constant_result does, but for importing the compiler: torch.compile
# shall not trace these, but ask them once.
machine_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
triton_widest._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # every call asks
def _machine_lacks(name: str, device_type: str, index: int | None) -> str | None:
    triton = name == "triton"
    reason = triton_installation.missing_reason() if triton else _cuda_kernels_missing()
    if reason is not None:
        return reason
    if triton and device_type in ("cpu", "cuda") and interprets_triton():
        return None
    if device_type == "cuda":
        refusal = _capability_refusal(torch.cuda.current_device() if index is None else index)
        return triton_installation.driver_missing_reason() if triton and not refusal else refusal
    where = f"the tensors are on {device_type}"
    return where if torch.cuda.is_available() else _gpu_missing()


@functools.cache
def _widest_on(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return MAX_HEAD_DIM
    little = torch.cuda.get_device_capability(device) in _LITTLE_SHARED_MEMORY
    return _LITTLE_SHARED_WIDTH if little else MAX_HEAD_DIM


def interprets_triton() -> bool:
    """Whether Triton runs on the CPU: TRITON_INTERPRET=1, set before the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gpu_missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU"
    return _capability_refusal(torch.cuda.current_device())


def _capability_refusal(index: int) -> str | None:
    if torch.version.cuda is None:
        return "torch is not a CUDA build"  # torch.cuda may be another vendor's GPU
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        return "compute capability {}.{}, needs {}.{}".format(*capability, *_LEAST_CAPABILITY)
    return None


def _cuda_kernels_missing() -> str | None:
    if extension.module is None:
        return str(extension.missing_reason)
    # csrc/cuda registers it where it was linked in.
    operator = "attn_kd::attention_kl_forward"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"):
        reason = missing_cuda_reason()
        return "the extension was built without CUDA" + (f": {reason}" if reason else "")
    return None


_warned: set[str] = set()


def _warn_slow_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"attn_kd uses its slow reference backend: {reason}. `attn-kd info` tells more.",
        stacklevel=5,  # whoever called attention_kl
    )
