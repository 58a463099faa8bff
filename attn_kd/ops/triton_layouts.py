"""The layouts of a call's tensors, and the checks that they fit together.

Nothing here looks at data, so that what was found of some layouts holds for all tensors of theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import triton_widest
from attn_kd.ops.checks import DIVERGENCES, DTYPES, HEAD_REDUCTIONS

# Elements between two rows beyond which an offset within a tile of 256 rows would not fit 32 bits.
FARTHEST_ROW = 2**31 // 256


class RefusedError(Exception):
    """What the operator finds wrong with a call; `dispatch` looks for a better explanation."""


class InputRefusedError(RefusedError, InputError):
    """The arguments do not fit together."""


class DtypeRefusedError(RefusedError, TypeError):
    """A dtype is not what it has to be: a TypeError as of the compiled operators."""


class Layout(NamedTuple):
    """What of a tensor decides how it is read."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Layouts = tuple[Layout | None, ...]  # of the fields of Operands


def layout_of(tensor: Tensor) -> Layout:
    """A tensor's layout."""
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def layouts_of(operands: Operands) -> Layouts:
    """The layouts of a call's tensors, None for what is not there."""
    return tuple([None if tensor is None else layout_of(tensor) for tensor in operands])


def is_in_reach(shape: torch.Size, strides: tuple[int, ...], group: int = 1) -> bool:
    """Whether a kernel can read [B, H, L, width] in place.

    The last stride must be 1, and rows within reach of 32 bits; a tile of keys that stand for
    groups of rows reaches that many times as far. No other stride may be 1, as those of one column
    are: Triton makes them compile-time constants, which 3.6 loses in a loop.
    """
    if shape[3] == 0:
        return True
    apart = all(stride != 1 for stride, size in zip(strides[:3], shape, strict=False) if size > 1)
    unit = strides[3] == 1 or shape[3] <= 1
    return unit and apart and group * strides[2] < FARTHEST_ROW


def mask_strides(mask: Layout) -> tuple[int, ...]:
    """The strides of a mask as [B, H, Lq, Lk], 0 where it is broadcast."""
    own = [0 if n == 1 else stride for n, stride in zip(mask.shape, mask.strides, strict=True)]
    return (0,) * (4 - len(own)) + tuple(own)


def check_layouts(layouts: Layouts, options: Options) -> None:
    """Check a call.

    The public functions explain what does not fit; what remains is that nothing is read past its
    end.

    Raises:
        InputError: the arguments do not fit together.
        TypeError: a dtype is not what it has to be.
    """
    query, key, value, teacher_query, teacher_key, teacher_lse, mask, seed = layouts
    assert query is not None and key is not None and value is not None
    for name, layout in zip(Operands._fields, layouts, strict=True):
        if layout is not None:
            check_device(name, layout, query)
    _check_student(query, key, value)
    _check_options(options)
    if (teacher_query is None) != (teacher_key is None):
        raise InputRefusedError("teacher_query and teacher_key come together")
    if teacher_query is not None and teacher_key is not None:
        averaged = options.head_reduction == "mean"
        _check_teacher(query, key, teacher_query, teacher_key, teacher_lse, averaged)
    if mask is not None:
        _check_mask(mask, query, key, teacher_query)
    if options.dropout_p > 0.0:
        _check_seed(seed)


def check_shape(name: str, tensor: Tensor | Layout, expected: tuple[int, ...]) -> None:
    """Check a tensor's shape.

    Raises:
        InputError: it differs.
    """
    if tensor.shape != expected:
        raise InputRefusedError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_device(name: str, tensor: Tensor | Layout, query: Tensor | Layout) -> None:
    """Check that a tensor is where the query is.

    Raises:
        InputError: it is elsewhere.
    """
    if tensor.device != query.device:
        raise InputRefusedError(f"{name} is on {tensor.device} but query is on {query.device}")


def _check_student(query: Layout, key: Layout, value: Layout) -> None:
    if not len(query.shape) == len(key.shape) == len(value.shape) == 4:
        raise InputRefusedError("query, key and value must have 4 dimensions")
    batch, heads, _, head_dim = query.shape
    keys = key.shape[2]
    check_shape("key", key, (batch, heads, keys, head_dim))
    check_shape("value", value, (batch, heads, keys, value.shape[3]))
    if 0 in query.shape or 0 in key.shape:
        raise InputRefusedError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}, "
            "expected no empty dimension"
        )
    _check_width("query", query)
    _check_width("value", value)
    if not query.dtype == key.dtype == value.dtype:
        raise DtypeRefusedError("query, key and value must have one dtype")
    _check_dtype("query", query)


def _check_teacher(
    query: Layout,
    key: Layout,
    teacher_query: Layout,
    teacher_key: Layout,
    teacher_lse: Layout | None,
    averaged: bool,
) -> None:
    if len(teacher_query.shape) != 4 or len(teacher_key.shape) != 4:
        raise InputRefusedError("teacher_query and teacher_key must have 4 dimensions")
    batch, heads, rows, _ = query.shape
    heads = teacher_query.shape[1] if averaged else heads
    group = max(1, teacher_key.shape[2] // key.shape[2])
    width = teacher_query.shape[3]
    check_shape("teacher_query", teacher_query, (batch, heads, rows, width))
    check_shape("teacher_key", teacher_key, (batch, heads, group * key.shape[2], width))
    if 0 in teacher_query.shape:
        raise InputRefusedError(
            f"teacher_query has shape {tuple(teacher_query.shape)}, expected no empty dimension"
        )
    _check_width("teacher_query", teacher_query)
    _check_dtype("teacher_query", teacher_query)
    _check_dtype("teacher_key", teacher_key)
    if teacher_lse is not None:
        check_shape("teacher_lse, a per-row tensor,", teacher_lse, (batch, heads, rows))
        if teacher_lse.dtype not in (torch.float32, torch.float64):
            raise DtypeRefusedError(f"teacher_lse is {teacher_lse.dtype}, expected torch.float32")


def _check_mask(mask: Layout, query: Layout, key: Layout, teacher_query: Layout | None) -> None:
    full = (*query.shape[:3], key.shape[2])
    fits = len(mask.shape) <= 4 and all(
        size in (1, want) for size, want in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise InputRefusedError(
            f"attn_mask has shape {tuple(mask.shape)}, expected one that broadcasts to {full}"
        )
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise DtypeRefusedError(
            f"attn_mask is {mask.dtype}, expected torch.bool or a floating dtype"
        )
    one_for_all = mask_strides(mask)[1] == 0
    if teacher_query is not None and teacher_query.shape[1] != query.shape[1] and not one_for_all:
        raise InputRefusedError(
            f"attn_mask has shape {tuple(mask.shape)}, expected one mask for all heads where "
            "teacher and student have different numbers of them"
        )


def _check_seed(seed: Layout | None) -> None:
    if seed is None or seed.dtype != torch.int64 or seed.shape != (2,):
        raise InputRefusedError("dropout_p > 0 needs a dropout_seed of int64 [2]")


def _check_options(options: Options) -> None:
    if options.divergence not in DIVERGENCES:
        raise InputRefusedError(f"divergence '{options.divergence}' is unknown")
    if options.head_reduction not in HEAD_REDUCTIONS:
        raise InputRefusedError(f"head_reduction '{options.head_reduction}' is unknown")
    if not 0.0 <= options.dropout_p < 1.0:
        raise InputRefusedError(
            f"dropout_p is {options.dropout_p}, expected a probability in [0, 1)"
        )


def _check_width(name: str, layout: Layout) -> None:
    widest = triton_widest(layout.device)
    if layout.shape[3] > widest:
        raise InputRefusedError(f"{name} has width {layout.shape[3]}, expected at most {widest}")


def _check_dtype(name: str, layout: Layout) -> None:
    if layout.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DtypeRefusedError(f"{name} is {layout.dtype}, expected float32, bfloat16 or float16")
