"""The public operators: attention, and attention with its divergence from a teacher's attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.ops.checks import check_row_weights
from attn_kd.ops.dispatch import run


class AttentionOutput(NamedTuple):
    """What `attention` returns."""

    output: Tensor  # [B, H, Lq, Dv], dtype of query
    lse: Tensor  # [B, H, Lq], float32 (float64 for float64 inputs)


class AttentionKLOutput(NamedTuple):
    """What `attention_kl` returns."""

    output: Tensor  # [B, H, Lq, Dv], dtype of query
    kl: Tensor  # [B, H, Lq], of head-averaged maps [B, Lq]; float32 (float64 for float64 inputs)
    lse: Tensor  # [B, H, Lq], same dtype as kl


class AttentionKLDivOutput(NamedTuple):
    """What `attention_kl_div` returns."""

    kl: Tensor  # [B, H, Lq], of head-averaged maps [B, Lq]; float32 (float64 for float64 inputs)
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
    """
    _check_given("value", value)
    operands = (query, key, value, None, None, None, attn_mask)
    options = (scale, None, "reverse_kl", "none", dropout_p)
    output, _, lse = run(operands, options, backend)
    return AttentionOutput(output, lse)


def attention_kl(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    teacher_query: Tensor,  # [B, Ht, Lq, Dt]
    teacher_key: Tensor,  # [B, Ht, Lk, Dt] or [B, Ht, G * Lk, Dt]
    *,
    teacher_lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    divergence: str = "reverse_kl",
    head_reduction: str = "none",
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> AttentionKLOutput:
    """Softmax attention and, in the same sweep over the keys, its divergence from a teacher's.

    With a = softmax(scale · query keyᵀ + mask) and b the teacher's map likewise, per head and row,
    ``output = a · value``, and ``kl`` is, with sums over the keys and m = (a + b) / 2:

    ================ ============================================================================
    ``"reverse_kl"`` Σ a log(a / b), the KL(student ‖ teacher) of Rubin et al. 2021, eq. 3
    ``"forward_kl"`` Σ b log(b / a), KL(teacher ‖ student)
    ``"js"``         ½ Σ a log(a / m) + ½ Σ b log(b / m), the Jensen-Shannon divergence
    ``"mse"``        Σ (a - b)², as in attention transfer (Zagoruyko and Komodakis 2017)
    ================ ============================================================================

    No map is stored, forward or backward. Gradients reach query, key and value through output, kl
    and lse; the teacher is a constant. Backward is deterministic.

    Args:
        query, key, value: float32, float64, bfloat16 or float16, one dtype; any strides with a
            unit last stride are read in place. Under autocast they are cast as
            `scaled_dot_product_attention` casts its own. Logits, softmax, divergence and sums are
            float32 (float64 for float64). On processors with AVX512-BF16, bfloat16 is multiplied
            by dot-product instructions, so that probabilities and gradients of logits are rounded
            to bfloat16 on their way into a product, and numbers below 1.2e-38 count as 0. Results
            may differ in their last digits between instruction sets, and the gradient of query
            between numbers of threads. On GPUs there is no float64, 16-bit operands go to the
            tensor cores with probabilities and gradients of logits rounded to their dtype, and
            products of float32 are exact to float32 unless
            `torch.backends.cuda.matmul.fp32_precision` (or `allow_tf32`) asks for TF32.
        teacher_query, teacher_key: any of these dtypes; may be wider or narrower than the
            student's, with another head_dim. Autocast leaves them as they are. With G times the
            student's keys, tokens jG to jG + G - 1 together are compared with the student's key j:
            the teacher's logit is t̃_j = log Σ_g exp t_g over the group, so that b_j is the
            teacher's mass on it. Masks apply to t̃.
        teacher_lse: [B, Ht, Lq] float32, natural log-sum-exp of the scaled and masked teacher
            logits (`attention(...).lse`, of tensors of the dtype given here); computed on the way
            if None.
        attn_mask: as in `scaled_dot_product_attention`: bool (True = may attend) or additive
            float, broadcastable to [B, H, Lq, Lk]; applies to student and teacher alike. A bias of
            -1e6 or less, such as -1e9 or torch.finfo(torch.float32).min, hides a key as -inf does
            (float16's lowest number, -65504, does not). A row that sees no key gives output 0,
            kl 0, lse -inf and zero gradients. Keys that a mask without a query dimension (key
            padding) hides may hold anything, NaN included; under other masks a NaN spreads as it
            does in `scaled_dot_product_attention`.
        row_weights: floating (differentiable) or bool, broadcastable to the shape of kl, which it
            multiplies: 0 for rows that are padding, say. Where it is False kl is 0 even in place of
            NaN; a weight that is the number 0 leaves NaN as it is.
        scale, teacher_scale: factors on the logits; default D ** -0.5 and Dt ** -0.5.
        divergence: one of those above.
        head_reduction: "none": one map, and one divergence, per head; Ht must be H. "mean": the
            divergence [B, Lq] of the maps averaged over heads, such as `nn.MultiheadAttention`
            returns; Ht may differ from H, and then one mask must serve all heads.
        dropout_p: probability with which an entry of the map does not reach the output; what
            remains is divided by 1 - dropout_p. kl and lse are those without dropout. The noise
            is drawn with torch's default generator of the device (`torch.manual_seed`).
        backend: None for the best one that can run; or a name of `available_backends()`. CUDA
            tensors are for "triton", whose kernels have been tested in Triton's interpreter and
            compiled for sm_80, sm_90 and sm_100, but not yet run on a GPU.

    Raises:
        InputError: the arguments do not fit together (the message names the offending value).
    """
    _check_given("value", value)
    _check_given("teacher_query", teacher_query)
    operands = (query, key, value, teacher_query, teacher_key, teacher_lse, attn_mask)
    options = (scale, teacher_scale, divergence, head_reduction, dropout_p)
    output, kl, lse = run(operands, options, backend)
    if row_weights is not None:
        kl = _weighted(kl, row_weights)
    return AttentionKLOutput(output, kl, lse)


def attention_kl_div(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    teacher_query: Tensor,  # [B, Ht, Lq, Dt]
    teacher_key: Tensor,  # [B, Ht, Lk, Dt] or [B, Ht, G * Lk, Dt]
    *,
    teacher_lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    row_weights: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    divergence: str = "reverse_kl",
    head_reduction: str = "none",
    backend: str | None = None,
) -> AttentionKLDivOutput:
    """The divergence of `attention_kl` alone: no value, no attention output, no work for either.

    Arguments, semantics and errors are those of `attention_kl`.
    """
    _check_given("teacher_query", teacher_query)
    operands = (query, key, None, teacher_query, teacher_key, teacher_lse, attn_mask)
    options = (scale, teacher_scale, divergence, head_reduction, 0.0)
    _, kl, lse = run(operands, options, backend)
    if row_weights is not None:
        kl = _weighted(kl, row_weights)
    return AttentionKLDivOutput(kl, lse)


def _check_given(name: str, tensor: Tensor | None) -> None:
    """Check what the operator beneath can do without, but not this function."""
    if tensor is None:
        raise InputError(f"{name} is None, expected a torch.Tensor")


def _weighted(kl: Tensor, row_weights: Tensor) -> Tensor:
    check_row_weights(row_weights, kl)
    if row_weights.dtype == torch.bool:
        return kl.masked_fill(~row_weights, 0.0)
    return kl * row_weights.to(kl.dtype)
