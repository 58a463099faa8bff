"""One place that decides which backend serves a call, and can say why each other one cannot."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from attn_kd.errors import InputError
from attn_kd.ops import extension

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the preferred ones first
MAX_HEAD_DIM = 256  # of the compiled kernels; the reference backend has no limit


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and if not, why."""

    available: bool
    reason: str


def available_backends() -> dict[str, BackendStatus]:
    """Return the status of every backend by name, the preferred ones first.

    ``status.reason`` says what a backend needs when ``status.available`` is false.
    """
    statuses = {
        "cuda": BackendStatus(False, "no CUDA kernels in this release"),
        "triton": BackendStatus(False, "no Triton kernels in this release"),
        "cpu": _cpu_status(),
        "reference": BackendStatus(True, "plain torch, any device; slower than the kernels"),
    }
    return {name: statuses[name] for name in BACKENDS}


def _cpu_status() -> BackendStatus:
    if extension.module is None:
        return BackendStatus(False, str(extension.missing_reason))
    return BackendStatus(True, f"compiled kernels, {extension.module.instruction_set()}")


def select_backend(requested: str | None, device: torch.device, head_dims: tuple[int, ...]) -> str:
    """Return the name of the backend that will run a call on `device`.

    Raises:
        InputError: `requested` is unknown, or cannot run here or with these inputs.
    """
    if requested is None:
        refusal = _refusal("cpu", device, head_dims)
        if refusal is None:
            return "cpu"
        _warn_slow_once(refusal)
        return "reference"
    # Not available_backends(): what it asks the extension cannot be traced by torch.compile.
    if requested not in BACKENDS:
        raise InputError(f"backend={requested!r} is unknown; expected one of {BACKENDS}")
    refusal = _refusal(requested, device, head_dims)
    if refusal is not None:
        raise InputError(f"backend={requested!r} cannot run here: {refusal}")
    return requested


def _refusal(name: str, device: torch.device, head_dims: tuple[int, ...]) -> str | None:
    if name == "reference":
        return None
    if name == "cpu":
        if extension.module is None:
            return extension.missing_reason
        if device.type != "cpu":
            return f"the tensors are on {device}"
        if max(head_dims) > MAX_HEAD_DIM:
            return f"head_dim {max(head_dims)} exceeds {MAX_HEAD_DIM}"
        return None
    return available_backends()[name].reason


_warned: set[str] = set()


def _warn_slow_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"attn_kd uses its slow reference backend: {reason}. `attn-kd info` tells more.",
        stacklevel=5,  # whoever called attention_kl
    )
