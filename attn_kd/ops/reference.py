"""The operator in plain torch: the readable twin of every kernel, and the backend of last resort.

It follows the definitions, not the streaming algebra of the kernels, so agreement between the two
means something. Query rows are processed in blocks, and each block is recomputed in the backward
pass, so that memory stays proportional to a block of the attention map rather than to all of it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.philox import keep_mask

# Elements of one [B, H, block, Lk] score tile. 36 MiB of floats is past the size (32 MiB) up to
# which glibc may keep freed memory in its heap: smaller tiles are faster, but fragment it into
# gigabytes.
_BLOCK_ELEMENTS = 9 * 1024 * 1024

# An additive mask value up to this one hides the pair as -inf does, in every backend: many masks
# are made of -1e9 or torch.finfo(dtype).min.
HIDDEN_BIAS = -1e6

# The log-probability of a hidden pair: its exponential is 0, and unlike -inf it leaves a difference
# of two of them, and the gradient of that, a number.
_LOG_ZERO = -1e30


def attention_kl_reference(operands: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention output [B, H, Lq, Dv], divergence and student LSE [B, H, Lq].

    The divergence is [B, H, Lq], or [B, Lq] of head-averaged maps, or empty without a teacher.
    Logits and reductions are float32 (float64 for float64 inputs) whatever the input dtype.
    """
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in operands
    )
    dtype = operands.query.dtype
    # Widened here rather than per block, so that the blocks' gradients add up in the wide type.
    operands = _without_padding(_widened(operands))
    batch, heads, rows, _ = operands.query.shape
    map_row = batch * max(heads, _teacher_heads(operands)) * _longest(operands)
    block = max(1, min(rows, _BLOCK_ELEMENTS // map_row))

    parts = []
    for start in range(0, rows, block):
        of_block = partial(_attention_kl_rows, options, start)
        tensors = _rows_of(operands, start, min(start + block, rows))
        if needs_grad and block < rows:
            parts.append(checkpoint(of_block, *tensors, use_reentrant=False))
        else:
            parts.append(of_block(*tensors))
    outputs, kls, lses = zip(*parts, strict=True)
    kl = torch.cat(kls, dim=-1) if operands.teacher_query is not None else kls[0].new_empty(0)
    return torch.cat(outputs, dim=2).to(dtype), kl, torch.cat(lses, dim=-1)


def _widened(operands: Operands) -> Operands:
    """The operands in the accumulation type, the mask in four dimensions."""
    wide = torch.promote_types(operands.query.dtype, torch.float32)
    mask = operands.attn_mask
    widened = {
        name: tensor.to(wide)
        for name, tensor in operands._asdict().items()
        if tensor is not None and name not in ("attn_mask", "dropout_seed")
    }
    if mask is not None:
        widened["attn_mask"] = mask[(None,) * (4 - mask.dim())]
    return operands._replace(**widened)


def _teacher_heads(operands: Operands) -> int:
    return 0 if operands.teacher_query is None else operands.teacher_query.shape[1]


def _longest(operands: Operands) -> int:
    keys = operands.key.shape[2]
    return keys if operands.teacher_key is None else max(keys, operands.teacher_key.shape[2])


def _without_padding(operands: Operands) -> Operands:
    """Zero the keys that a key padding mask hides: NaN in them must not reach a product."""
    mask = operands.attn_mask
    if mask is None or (mask.shape[2] > 1 and mask.stride(2) != 0):
        return operands
    visible = _visible(mask[:, :, :1])
    assert visible is not None
    padding = ~visible.transpose(-1, -2).expand(-1, -1, operands.key.shape[2], -1)
    teacher_key = operands.teacher_key
    if teacher_key is not None:
        group = teacher_key.shape[2] // operands.key.shape[2]
        teacher_key = teacher_key.masked_fill(padding.repeat_interleave(group, dim=2), 0.0)
    return operands._replace(
        key=operands.key.masked_fill(padding, 0.0),
        value=operands.value.masked_fill(padding, 0.0),
        teacher_key=teacher_key,
    )


def _rows_of(operands: Operands, start: int, stop: int) -> Operands:
    mask = operands.attn_mask
    return operands._replace(
        query=operands.query[:, :, start:stop],
        teacher_query=_sliced(operands.teacher_query, start, stop),
        teacher_lse=_sliced(operands.teacher_lse, start, stop),
        attn_mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:stop],
    )


def _sliced(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[:, :, start:stop]


def _attention_kl_rows(
    options: Options, first_row: int, *tensors: Any
) -> tuple[Tensor, Tensor, Tensor]:
    operands = Operands(*tensors)
    query, key, value, *_, dropout_seed = operands
    visible = _visible(operands.attn_mask)
    logits = _masked(_products(query, key, options.scale), operands.attn_mask, visible)
    lse = torch.logsumexp(logits, dim=-1)
    # Not logits - lse: where a row's logits share a large offset, its LSE has no digits left.
    log_attention = torch.log_softmax(logits, dim=-1)
    attention = log_attention.exp()
    if dropout_seed is not None:
        kept = keep_mask(dropout_seed, options.dropout_p, attention.shape, first_row)
        attention = torch.where(kept, attention / (1.0 - options.dropout_p), 0.0)
    output = attention @ value

    kl = lse.new_zeros(lse.shape)
    row_visible = None if visible is None else visible.any(dim=-1)
    if operands.teacher_query is not None:
        log_teacher = _log_teacher(operands, options, visible)
        log_attention = _floored(log_attention, visible)
        rows_compared = row_visible
        if options.head_reduction == "mean":
            log_attention, log_teacher = _mean(log_attention), _mean(log_teacher)
            rows_compared = None if row_visible is None else row_visible.any(dim=1)
        kl = DIVERGENCES[options.divergence](log_attention, log_teacher).sum(-1)
        kl = kl if rows_compared is None else torch.where(rows_compared, kl, 0.0)

    # A row that sees no key was computed as if it saw all of them, and is replaced: every
    # intermediate stays finite, so its gradient is an exact zero instead of NaN.
    if row_visible is not None:
        output = torch.where(row_visible[..., None], output, 0.0)
        lse = torch.where(row_visible, lse, float("-inf"))
    return output, kl, lse


def _log_teacher(operands: Operands, options: Options, visible: Tensor | None) -> Tensor:
    """The teacher's log-probabilities [B, Ht, rows, Lk], a group of its keys taken together."""
    assert operands.teacher_query is not None and operands.teacher_key is not None
    logits = _products(operands.teacher_query, operands.teacher_key, options.teacher_scale)
    keys = operands.key.shape[2]
    if operands.teacher_key.shape[2] != keys:
        logits = logits.unflatten(-1, (keys, -1)).logsumexp(dim=-1)
    logits = _masked(logits, operands.attn_mask, visible)
    if operands.teacher_lse is None:
        return _floored(torch.log_softmax(logits, dim=-1), visible)
    return _floored(logits - operands.teacher_lse[..., None], visible)


def _visible(attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attn_mask
    return ~(attn_mask <= HIDDEN_BIAS)  # in this form NaN stays visible


def _products(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    return scale * (query @ key.transpose(-1, -2))


def _masked(logits: Tensor, attn_mask: Tensor | None, visible: Tensor | None) -> Tensor:
    """Masked logits; those of a row that sees nothing stay as they are."""
    if attn_mask is None or visible is None:
        return logits
    if attn_mask.dtype != torch.bool:
        logits = logits + attn_mask.to(logits.dtype).masked_fill(~visible, 0.0)
    hidden = ~visible & visible.any(dim=-1, keepdim=True)
    return logits.masked_fill(hidden, float("-inf"))


def _floored(log_probability: Tensor, visible: Tensor | None) -> Tensor:
    """Log-probabilities with `_LOG_ZERO` for hidden pairs."""
    return log_probability if visible is None else torch.where(visible, log_probability, _LOG_ZERO)


def _mean(log_probability: Tensor) -> Tensor:
    """The logarithm [B, rows, Lk] of the average over heads."""
    return torch.logsumexp(log_probability, dim=1) - math.log(log_probability.shape[1])


def _reverse_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return log_a.exp() * (log_a - log_b)


def _forward_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return log_b.exp() * (log_b - log_a)


def _js(log_a: Tensor, log_b: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_a, log_b) - math.log(2)
    return 0.5 * (_reverse_kl(log_a, log_m) + _reverse_kl(log_b, log_m))


def _mse(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() - log_b.exp()).square()


# What one key adds to the divergence of student a and teacher b, from their log-probabilities.
# These are the divergences there are: every list of their names is made from this one, but for that
# of the compiled kernels, which a test compares with it.
DIVERGENCES = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "js": _js, "mse": _mse}
