"""Checks of what a caller passed, made once, at the public boundary."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from attn_kd.errors import InputError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIVERGENCES = ("reverse_kl", "forward_kl")
PLANNED_DIVERGENCES = ("js", "mse")


def check_student(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    """Check query [B, H, Lq, D], key [B, H, Lk, D], value [B, H, Lk, Dv] against each other."""
    tensors = {"query": query, "key": key}
    if value is not None:
        tensors["value"] = value
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if tensor.dtype != query.dtype:
            raise InputError(
                f"{name} is {tensor.dtype} but query is {query.dtype}; expected one dtype"
            )
        if tensor.device != query.device:
            raise InputError(f"{name} is on {tensor.device} but query is on {query.device}")
        if tensor.shape[:2] != query.shape[:2]:
            raise InputError(
                f"{name} has batch and heads {tuple(tensor.shape[:2])}, "
                f"expected {tuple(query.shape[:2])} as in query"
            )
    if key.shape[3] != query.shape[3]:
        raise InputError(f"key has head_dim {key.shape[3]}, expected {query.shape[3]} as in query")
    if value is not None and value.shape[2] != key.shape[2]:
        raise InputError(
            f"value has {value.shape[2]} keys (dim 2), expected {key.shape[2]} as in key"
        )


def check_teacher(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_lse: Tensor | None,
) -> None:
    """Check the teacher's [B, H, Lq, Dt] and [B, H, Lk, Dt] against the student's tensors."""
    pairs = (("teacher_query", teacher_query, query), ("teacher_key", teacher_key, key))
    for name, tensor, partner in pairs:
        _check_tensor(name, tensor)
        if tensor.device != query.device:
            raise InputError(f"{name} is on {tensor.device} but query is on {query.device}")
        if tensor.shape[0] != partner.shape[0]:
            raise InputError(f"{name} has batch {tensor.shape[0]}, expected {partner.shape[0]}")
        if tensor.shape[1] != partner.shape[1]:
            raise InputError(
                f"{name} has {tensor.shape[1]} heads, expected {partner.shape[1]}: "
                'head_reduction="none" pairs heads one to one'
            )
        if tensor.shape[2] != partner.shape[2]:
            raise InputError(
                f"{name} has {tensor.shape[2]} tokens, expected {partner.shape[2]}: "
                "teacher and student must attend over the same grid"
            )
    if teacher_key.shape[3] != teacher_query.shape[3]:
        raise InputError(
            f"teacher_key has head_dim {teacher_key.shape[3]}, "
            f"expected {teacher_query.shape[3]} as in teacher_query"
        )
    if teacher_lse is not None:
        _check_teacher_lse(teacher_lse, query)


def _check_teacher_lse(teacher_lse: Tensor, query: Tensor) -> None:
    if teacher_lse.dtype not in (torch.float32, torch.float64):
        raise InputError(f"teacher_lse is {teacher_lse.dtype}, expected torch.float32")
    if teacher_lse.shape != query.shape[:3]:
        raise InputError(
            f"teacher_lse has shape {tuple(teacher_lse.shape)}, expected {tuple(query.shape[:3])}"
        )
    if teacher_lse.device != query.device:
        raise InputError(f"teacher_lse is on {teacher_lse.device} but query is on {query.device}")


def expand_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the mask as a [B, H, Lq, Lk] view; broadcast dimensions keep stride 0."""
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        raise InputError(f"attn_mask is {attn_mask.dtype}, expected torch.bool or a floating dtype")
    if attn_mask.device != query.device:
        raise InputError(f"attn_mask is on {attn_mask.device} but query is on {query.device}")
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise InputError("attn_mask requires grad, but no gradient is computed for it; detach it")
    full = (*query.shape[:3], key.shape[2])
    fits = attn_mask.dim() <= 4 and all(
        size in (1, want)
        for size, want in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise InputError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, expected one that broadcasts to {full}"
        )
    return attn_mask.expand(full)


def resolve_scale(name: str, scale: float | None, head_dim: int) -> float:
    """Return the factor on the logits, by default head_dim ** -0.5."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not math.isfinite(scale):
        raise InputError(f"{name}={scale} is not a finite number")
    return float(scale)


def check_options(divergence: str, head_reduction: str, dropout_p: float) -> None:
    """Check the options of `attention_kl`; what is planned but absent is NotImplementedError."""
    if divergence in PLANNED_DIVERGENCES:
        raise NotImplementedError(f"divergence={divergence!r} is not available yet")
    if divergence not in DIVERGENCES:
        raise InputError(f"divergence={divergence!r} is unknown; expected one of {DIVERGENCES}")
    if head_reduction == "mean":
        raise NotImplementedError('head_reduction="mean" is not available yet')
    if head_reduction != "none":
        raise InputError(f'head_reduction={head_reduction!r} is unknown; expected "none" or "mean"')
    check_dropout(dropout_p)


def check_dropout(dropout_p: float) -> None:
    """Only dropout_p = 0 is implemented."""
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p={dropout_p} is not a probability in [0, 1)")
    if dropout_p > 0.0:
        raise NotImplementedError(f"dropout_p={dropout_p} is not available yet; only 0.0 is")


_warned_teacher_grad = False


def detach_teacher(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Detach the teacher's tensors; say once that they get no gradient if they asked for one."""
    global _warned_teacher_grad
    asks = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    silent = torch.compiler.is_compiling() or _warned_teacher_grad
    if asks and torch.is_grad_enabled() and not silent:
        _warned_teacher_grad = True
        warnings.warn(
            "a teacher tensor requires grad; attn_kd treats the teacher as constant "
            "and computes no gradient for it",
            stacklevel=3,
        )
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, "
            "expected 4 dimensions [batch, heads, length, dim]"
        )
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{name} is {tensor.dtype}, expected float32, float64, bfloat16 or float16"
        )
    if 0 in tensor.shape:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected no empty dimension")
