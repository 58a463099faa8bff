"""Checks of what a caller passed, made once, at the public boundary."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.ops import reference
from attn_kd.ops.arguments import Operands, Options

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIVERGENCES = tuple(reference.DIVERGENCES)
HEAD_REDUCTIONS = ("none", "mean")
MAX_SCALE = 1e38  # beyond it a float32 logit of size 1 is infinite


def check_operands(operands: Operands, options: Options, *, with_value: bool = True) -> None:
    """Check the tensors of a call against each other; a value that is not used may be empty.

    Raises:
        InputError: one does not fit; the message names it, its value and what was expected.
    """
    _check_student(operands, with_value)
    if operands.teacher_query is not None or operands.teacher_key is not None:
        _check_teacher(operands, options)
    if operands.attn_mask is not None:
        _check_mask(operands)


def check_options(divergence: str, head_reduction: str, dropout_p: float = 0.0) -> None:
    """Check the options of `attention_kl` that are names, and the probability.

    Raises:
        InputError: a name is unknown, or dropout_p is not a probability below 1.
    """
    if divergence not in DIVERGENCES:
        raise InputError(f"divergence={divergence!r} is unknown; expected one of {DIVERGENCES}")
    if head_reduction not in HEAD_REDUCTIONS:
        raise InputError(f'head_reduction={head_reduction!r} is unknown; expected "none" or "mean"')
    check_dropout(dropout_p)


def check_dropout(dropout_p: float) -> None:
    """Check the probability of dropout.

    Raises:
        InputError: it is not in [0, 1).
    """
    if not (isinstance(dropout_p, int | float) and 0.0 <= dropout_p < 1.0):
        raise InputError(f"dropout_p={dropout_p!r} is not a probability in [0, 1)")


def check_is_tensor(name: str, tensor: object) -> None:
    """Check that what should be a tensor is one.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")


def checked_scale(name: str, scale: float | None) -> float | None:
    """Return the factor on the logits as a float, None where the default is meant."""
    if scale is None:
        return None
    try:
        factor = float(scale)
    except (TypeError, ValueError, OverflowError):
        factor = math.nan
    if not abs(factor) <= MAX_SCALE:
        raise InputError(f"{name}={scale!r} is not a number from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return factor


def check_row_weights(row_weights: Tensor, kl: Tensor) -> None:
    """Check that the weights of rows broadcast to the divergence, [B, H, Lq] or [B, Lq]."""
    check_is_tensor("row_weights", row_weights)
    if row_weights.dtype not in (*DTYPES, torch.bool):
        raise InputError(f"row_weights is {row_weights.dtype}, expected a floating dtype or bool")
    if row_weights.device != kl.device:
        raise InputError(f"row_weights is on {row_weights.device} but query is on {kl.device}")
    if not _broadcasts(row_weights.shape, kl.shape):
        raise InputError(
            f"row_weights has shape {tuple(row_weights.shape)}, "
            f"expected one that broadcasts to {tuple(kl.shape)}"
        )


_warned_teacher_grad = False


def detach_teacher(operands: Operands) -> Operands:
    """Detach the teacher's tensors; say once that they get no gradient if they asked for one."""
    global _warned_teacher_grad
    teacher = (operands.teacher_query, operands.teacher_key, operands.teacher_lse)
    asks = any(tensor is not None and tensor.requires_grad for tensor in teacher)
    silent = torch.compiler.is_compiling() or _warned_teacher_grad
    if asks and torch.is_grad_enabled() and not silent:
        _warned_teacher_grad = True
        warnings.warn(
            "a teacher tensor requires grad; attn_kd treats the teacher as constant "
            "and computes no gradient for it",
            stacklevel=5,  # whoever called the public operator
        )
    query, key, lse = (None if tensor is None else tensor.detach() for tensor in teacher)
    return operands._replace(teacher_query=query, teacher_key=key, teacher_lse=lse)


def _check_student(operands: Operands, with_value: bool) -> None:
    query, key, value, *_ = operands
    for name in ("query", "key", "value"):
        tensor = getattr(operands, name)
        _check_tensor(name, tensor, may_be_empty=name == "value" and not with_value)
        if tensor.dtype != query.dtype:
            raise InputError(
                f"{name} is {tensor.dtype} but query is {query.dtype}; expected one dtype"
            )
        _check_device(name, tensor, query)
        if tensor.shape[:2] != query.shape[:2]:
            raise InputError(
                f"{name} has batch and heads {tuple(tensor.shape[:2])}, "
                f"expected {tuple(query.shape[:2])} as in query"
            )
    if key.shape[3] != query.shape[3]:
        raise InputError(f"key has head_dim {key.shape[3]}, expected {query.shape[3]} as in query")
    if value.shape[2] != key.shape[2]:
        raise InputError(
            f"value has {value.shape[2]} keys (dim 2), expected {key.shape[2]} as in key"
        )


def _check_teacher(operands: Operands, options: Options) -> None:
    query, key, _, teacher_query, teacher_key, teacher_lse, *_ = operands
    for name in ("teacher_query", "teacher_key"):
        tensor = getattr(operands, name)
        _check_tensor(name, tensor)
        _check_device(name, tensor, query)
        if tensor.shape[0] != query.shape[0]:
            raise InputError(f"{name} has batch {tensor.shape[0]}, expected {query.shape[0]}")
    assert teacher_query is not None and teacher_key is not None
    _check_teacher_heads(operands, options)
    if teacher_query.shape[2] != query.shape[2]:
        raise InputError(
            f"teacher_query has {teacher_query.shape[2]} tokens, expected {query.shape[2]}: "
            "teacher and student must be asked the same queries"
        )
    if teacher_key.shape[2] % key.shape[2] != 0:
        raise InputError(
            f"teacher_key has {teacher_key.shape[2]} tokens, expected {key.shape[2]} as in key, "
            "or a multiple of it: a group of the teacher's tokens for each of the student's"
        )
    if teacher_key.shape[3] != teacher_query.shape[3]:
        raise InputError(
            f"teacher_key has head_dim {teacher_key.shape[3]}, "
            f"expected {teacher_query.shape[3]} as in teacher_query"
        )
    if teacher_lse is not None:
        _check_teacher_lse(teacher_lse, teacher_query)


def _check_teacher_heads(operands: Operands, options: Options) -> None:
    assert operands.teacher_query is not None and operands.teacher_key is not None
    heads, teacher_heads = operands.query.shape[1], operands.teacher_query.shape[1]
    for name in ("teacher_query", "teacher_key"):
        found = getattr(operands, name).shape[1]
        if options.head_reduction == "none" and found != heads:
            raise InputError(
                f"{name} has {found} heads, expected {heads}: "
                'head_reduction="none" pairs heads one to one'
            )
    if operands.teacher_key.shape[1] != teacher_heads:
        raise InputError(
            f"teacher_key has {operands.teacher_key.shape[1]} heads, "
            f"expected {teacher_heads} as in teacher_query"
        )


def _check_teacher_lse(teacher_lse: Tensor, teacher_query: Tensor) -> None:
    check_is_tensor("teacher_lse", teacher_lse)
    if teacher_lse.dtype not in (torch.float32, torch.float64):
        raise InputError(f"teacher_lse is {teacher_lse.dtype}, expected torch.float32")
    expected = tuple(teacher_query.shape[:3])
    if tuple(teacher_lse.shape) != expected:
        raise InputError(f"teacher_lse has shape {tuple(teacher_lse.shape)}, expected {expected}")
    _check_device("teacher_lse", teacher_lse, teacher_query)


def _check_mask(operands: Operands) -> None:
    query, key, attn_mask = operands.query, operands.key, operands.attn_mask
    check_is_tensor("attn_mask", attn_mask)
    assert attn_mask is not None
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        raise InputError(f"attn_mask is {attn_mask.dtype}, expected torch.bool or a floating dtype")
    _check_device("attn_mask", attn_mask, query)
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise InputError("attn_mask requires grad, but no gradient is computed for it; detach it")
    full = (*query.shape[:3], key.shape[2])
    if not _broadcasts(attn_mask.shape, full):
        raise InputError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, expected one that broadcasts to {full}"
        )
    if operands.teacher_query is None:
        return
    heads, teacher_heads = query.shape[1], operands.teacher_query.shape[1]
    if teacher_heads != heads and attn_mask.dim() >= 3 and attn_mask.shape[-3] != 1:
        raise InputError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, one mask for each of {heads} heads, "
            f"but the teacher has {teacher_heads}; expected a mask common to all heads"
        )


def _broadcasts(shape: torch.Size, full: tuple[int, ...]) -> bool:
    return len(shape) <= len(full) and all(
        size in (1, want) for size, want in zip(reversed(shape), reversed(full), strict=False)
    )


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise InputError(f"{name} is on {tensor.device} but query is on {query.device}")


def _check_tensor(name: str, tensor: Tensor | None, may_be_empty: bool = False) -> None:
    check_is_tensor(name, tensor)
    assert tensor is not None
    if tensor.dim() != 4:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, "
            "expected 4 dimensions [batch, heads, length, dim]"
        )
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{name} is {tensor.dtype}, expected float32, float64, bfloat16 or float16"
        )
    if 0 in tensor.shape and not may_be_empty:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected no empty dimension")
