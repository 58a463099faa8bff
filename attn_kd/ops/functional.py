"""The public operators: attention, and attention with its divergence from a teacher's attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_kd.ops import checks
from attn_kd.ops.autograd import fused_attention_kl
from attn_kd.ops.backends import select_backend
from attn_kd.ops.reference import attention_kl_reference


class AttentionOutput(NamedTuple):
    """What `attention` returns."""

    output: Tensor  # [B, H, Lq, Dv], dtype of query
    lse: Tensor  # [B, H, Lq], float32 (float64 for float64 inputs)


class AttentionKLOutput(NamedTuple):
    """What `attention_kl` returns."""

    output: Tensor  # [B, H, Lq, Dv], dtype of query
    kl: Tensor  # [B, H, Lq], float32 (float64 for float64 inputs)
    lse: Tensor  # [B, H, Lq], same dtype as kl


class AttentionKLDivOutput(NamedTuple):
    """What `attention_kl_div` returns."""

    kl: Tensor  # [B, H, Lq], float32 (float64 for float64 inputs)
    lse: Tensor  # [B, H, Lq], same dtype as kl


def attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> AttentionOutput:
    """Softmax attention and the log-sum-exp of its logits, without storing the attention map.

    Arguments are those of `attention_kl`. `lse` [B, H, Lq] is the natural logarithm of the sum of
    exponentials of the scaled and masked logits, -inf for a row that sees no key; it is
    differentiable, and it is what a student's call wants as `teacher_lse`.

    Raises:
        InputError: the arguments do not fit together (the message names the offending value).
        NotImplementedError: dropout_p > 0.
    """
    query, key, value = _autocast(query, key, value)
    checks.check_student(query, key, value)
    checks.check_dropout(dropout_p)
    scale = checks.resolve_scale("scale", scale, query.shape[3])
    output, _, lse = _dispatch(
        backend,
        query,
        key,
        value,
        None,
        None,
        None,
        checks.expand_mask(attn_mask, query, key),
        scale,
        1.0,
        "reverse_kl",
    )
    return AttentionOutput(output, lse)


def attention_kl(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    teacher_query: Tensor,  # [B, H, Lq, Dt]
    teacher_key: Tensor,  # [B, H, Lk, Dt]
    *,
    teacher_lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    divergence: str = "reverse_kl",
    head_reduction: str = "none",
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> AttentionKLOutput:
    """Softmax attention and, in the same sweep over the keys, its divergence from a teacher's.

    With a = softmax(scale · query keyᵀ + mask) and b the teacher's map likewise, per head and row:
    ``output = a · value`` and ``kl`` = Σ a log(a / b) for ``"reverse_kl"``, the
    KL(student ‖ teacher) of Rubin et al. 2021 (eq. 3), or Σ b log(b / a) for ``"forward_kl"``.
    Neither map is stored, forward or backward. Gradients reach query, key and value through output,
    kl and lse; the teacher is a constant. Backward is deterministic.

    Args:
        query, key, value: float32, float64, bfloat16 or float16, one dtype; any strides with a
            unit last stride are read in place. Under autocast they are cast as
            `scaled_dot_product_attention` casts its own.
        teacher_query, teacher_key: any of these dtypes; may be wider or narrower than the
            student's, with another head_dim. Autocast leaves them as they are.
        teacher_lse: [B, H, Lq] float32, natural log-sum-exp of the scaled and masked teacher
            logits (`attention(...).lse`, of tensors of the dtype given here); computed on the way
            if None.
        attn_mask: as in `scaled_dot_product_attention`: bool (True = may attend) or additive
            float, broadcastable to [B, H, Lq, Lk]; applies to student and teacher alike. A bias of
            -1e6 or less, such as -1e9 or torch.finfo(torch.float32).min, hides a key as -inf does
            (float16's lowest number, -65504, does not). A row that sees no key gives output 0,
            kl 0, lse -inf and zero gradients. Keys that a mask without a query dimension (key
            padding) hides may hold anything, NaN included; under other masks a NaN spreads as it
            does in `scaled_dot_product_attention`.
        scale, teacher_scale: factors on the logits; default D ** -0.5 and Dt ** -0.5.
        divergence: "reverse_kl" or "forward_kl".
        head_reduction: "none": one map, and one divergence, per head.
        dropout_p: only 0.
        backend: None for the best one that can run; or a name of `available_backends()`.

    Raises:
        InputError: the arguments do not fit together (the message names the offending value).
        NotImplementedError: an option of the contract that this release does not have.
    """
    query, key, value = _autocast(query, key, value)
    checks.check_student(query, key, value)
    checks.check_options(divergence, head_reduction, dropout_p)
    checks.check_teacher(query, key, teacher_query, teacher_key, teacher_lse)
    teacher = checks.detach_teacher(teacher_query, teacher_key, teacher_lse)
    return AttentionKLOutput(
        *_dispatch(
            backend,
            query,
            key,
            value,
            *teacher,
            checks.expand_mask(attn_mask, query, key),
            checks.resolve_scale("scale", scale, query.shape[3]),
            checks.resolve_scale("teacher_scale", teacher_scale, teacher_query.shape[3]),
            divergence,
        )
    )


def attention_kl_div(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    teacher_query: Tensor,  # [B, H, Lq, Dt]
    teacher_key: Tensor,  # [B, H, Lk, Dt]
    *,
    teacher_lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    divergence: str = "reverse_kl",
    head_reduction: str = "none",
    backend: str | None = None,
) -> AttentionKLDivOutput:
    """The divergence of `attention_kl` alone: no value, no attention output, no work for either.

    Arguments, semantics and errors are those of `attention_kl`.
    """
    query, key = _autocast(query, key)
    checks.check_student(query, key, None)
    checks.check_options(divergence, head_reduction, 0.0)
    checks.check_teacher(query, key, teacher_query, teacher_key, teacher_lse)
    teacher = checks.detach_teacher(teacher_query, teacher_key, teacher_lse)
    _, kl, lse = _dispatch(
        backend,
        query,
        key,
        key[..., :0].detach(),  # a value of width 0
        *teacher,
        checks.expand_mask(attn_mask, query, key),
        checks.resolve_scale("scale", scale, query.shape[3]),
        checks.resolve_scale("teacher_scale", teacher_scale, teacher_query.shape[3]),
        divergence,
    )
    return AttentionKLDivOutput(kl, lse)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the student's tensors as autocast casts those of scaled_dot_product_attention."""
    device_type = tensors[0].device.type
    if not _autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _autocast_enabled(device_type: str) -> bool:
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _dispatch(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    teacher_query = rest[0]
    teacher_dim = 0 if teacher_query is None else teacher_query.shape[3]
    head_dims = (query.shape[3], value.shape[3], teacher_dim)
    if select_backend(backend, query.device, head_dims) == "reference":
        if not _autocast_enabled(query.device.type):
            return attention_kl_reference(query, key, value, *rest)
        # The logits stay float32 under autocast too: rounding them spoils the gradient.
        with torch.autocast(query.device.type, enabled=False):
            return attention_kl_reference(query, key, value, *rest)
    return fused_attention_kl(query, key, value, *rest)
