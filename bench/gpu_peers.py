"""The candidates on a GPU, where torch has several attentions: each by its name, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_kd.errors import InputError
from bench.peers import CANDIDATES, Candidate, fused
from bench.rounds import YARDSTICK

# What torch's selector, and cuDNN behind it, raise where a pinned backend does not take the inputs.
NO_KERNEL = ("No available kernel", "No viable backend", "cuDNN Frontend error")


def pinned_sdpa(
    backend: SDPBackend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, None]:
    """One of torch's attentions of the student alone, no divergence; its backward is its own."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value), None


PINNED_SDPA: dict[str, Candidate] = {
    "sdpa flash": partial(pinned_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": partial(pinned_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": partial(pinned_sdpa, SDPBackend.EFFICIENT_ATTENTION),
}
GPU_CANDIDATES: dict[str, Candidate] = {
    **PINNED_SDPA,
    "attn_kd cuda": partial(fused, backend="cuda"),  # runs only when asked for
    **{name: candidate for name, candidate in CANDIDATES.items() if name != YARDSTICK},
}

MAY_REFUSE = (*PINNED_SDPA, "attn_kd cuda")  # dtypes, sizes, GPUs that they were not made for


def candidates_on(device: torch.device) -> dict[str, Candidate]:
    """Everybody who may be compared there, by name."""
    return CANDIDATES if device.type == "cpu" else GPU_CANDIDATES


def split_refused(
    functions: dict[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The functions of the candidates that run, and why each other one of `MAY_REFUSE` does not."""
    reasons = {name: refusal(functions[name]) for name in MAY_REFUSE if name in functions}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return {name: f for name, f in functions.items() if name not in refused}, refused


def refusal(function: Callable[[], Any]) -> str | None:
    """Why a candidate cannot do this piece of work, in torch's or attn_kd's words; None if it can.

    Any other failure than a refusal is raised.
    """
    torch.set_warn_always(True)  # torch gives its reasons as warnings, each only once
    try:
        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            function()
    except (RuntimeError, InputError) as error:
        if isinstance(error, InputError):
            return str(error)
        if not any(words in str(error) for words in NO_KERNEL):
            raise
        said = [str(reason.message).partition(" (Triggered")[0] for reason in reasons]
        return " ".join([str(error).partition("\n")[0], *said])
    finally:
        torch.set_warn_always(False)
    return None
