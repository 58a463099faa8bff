"""A call of the Triton operators as its kernels see it: checked, with strides in reach.

What follows from layouts and options is remembered by them: to find it again would take several
times as long as a small attention does.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.checks import MAX_SCALE
from attn_kd.ops.triton_layouts import (
    FARTHEST_ROW,
    InputRefusedError,
    Layout,
    Layouts,
    check_device,
    check_layouts,
    check_shape,
    is_in_reach,
    layout_of,
    layouts_of,
    mask_strides,
)

# Shapes, strides and dtypes of what the forward operator returns.
Results = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True, eq=False)  # there is one for all calls of a kind: identity tells them apart
class Facts:
    """What follows from the layouts and options of a call."""

    sizes: dict[str, int]  # the kernels' arguments of that kind
    head_dim: int
    value_dim: int  # 0 where the divergence alone is wanted
    teacher_dim: int  # 0 without a teacher
    student_itemsize: int
    teacher_itemsize: int
    group: int  # how many of the teacher's keys belong to one of the student's
    mask_strides: tuple[int, ...] | None  # of [B, H, Lq, Lk], 0 where it is broadcast
    teacher_lse_given: bool
    scale: float
    teacher_scale: float
    divergence: str  # "none" without a teacher
    average_heads: bool  # several, before the maps are compared
    kl_shape: tuple[int, ...]  # [B, H, Lq], of head-averaged maps [B, Lq], without a teacher [0]
    dropout_p: float
    in_place: bool  # nothing has to be copied or converted before the kernels can read it
    results: Results

    @property
    def two_pass(self) -> bool:
        """Whether the divergence needs the maps themselves, which only a second pass has."""
        return self.average_heads or self.divergence not in ("none", "reverse_kl", "forward_kl")


class Problem(NamedTuple):
    """One call: operands that kernels can read where they are, and what is known of them."""

    operands: Operands
    options: Options
    facts: Facts

    def changed(self, options: Options, **operands: Tensor | None) -> Problem:
        """Another problem with other options and some other operands."""
        return make_problem(self.operands._replace(**operands), options)  # type: ignore[arg-type]


def make_problem(operands: Operands, options: Options) -> Problem:
    """Check a call and describe it.

    Raises:
        InputError: the arguments do not fit together.
        TypeError: a dtype is not what it has to be.
    """
    facts = _facts(layouts_of(operands), options)
    if not facts.in_place:
        operands = _within_reach(operands, facts.group)
        facts = _facts(layouts_of(operands), options)
    return Problem(operands, options, facts)


@functools.lru_cache(maxsize=4096)
def _facts(layouts: Layouts, options: Options) -> Facts:
    check_layouts(layouts, options)
    query, key, value, teacher_query, teacher_key, teacher_lse, mask, _ = layouts
    assert query is not None and key is not None and value is not None
    batch, heads, rows, head_dim = query.shape
    keys = key.shape[2]
    sizes = {
        "batch_heads": batch * heads,
        "heads": heads,
        "query_length": rows,
        "key_length": keys,
    }
    kl_shape: tuple[int, ...] = (0,)
    teacher_scale, teacher_dim, teacher_itemsize, group, averages = 1.0, 0, 0, 1, False
    if teacher_query is not None and teacher_key is not None:
        averaged = options.head_reduction == "mean"
        averages = averaged and max(heads, teacher_query.shape[1]) > 1
        kl_shape = (batch, rows) if averaged else (batch, heads, rows)
        teacher_dim, group = teacher_query.shape[3], teacher_key.shape[2] // keys
        teacher_itemsize = max(teacher_query.dtype.itemsize, teacher_key.dtype.itemsize)
        teacher_scale = _resolved_scale("teacher_scale", options.teacher_scale, teacher_dim)
    return Facts(
        sizes=sizes,
        head_dim=head_dim,
        value_dim=value.shape[3],
        teacher_dim=teacher_dim,
        student_itemsize=query.dtype.itemsize,
        teacher_itemsize=teacher_itemsize,
        group=group,
        mask_strides=None if mask is None else mask_strides(mask),
        teacher_lse_given=teacher_lse is not None,
        scale=_resolved_scale("scale", options.scale, head_dim),
        teacher_scale=teacher_scale,
        divergence="none" if teacher_query is None else options.divergence,
        average_heads=averages,
        kl_shape=kl_shape,
        dropout_p=options.dropout_p,
        in_place=_are_in_place(layouts, group),
        results=_results(layouts, options),
    )


def _results(layouts: Layouts, options: Options) -> Results:
    """What attn_kd/ops/fake.py says, by arithmetic: tensors would take ten times as long."""
    query, _, value, teacher_query, _, teacher_lse, *_ = layouts
    assert query is not None and value is not None
    (batch, heads, rows, _), value_dim = query.shape, value.shape[3]
    kl_shape: tuple[int, ...] = (0,)
    own_lse_shape: tuple[int, ...] = (0,)
    if teacher_query is not None:
        averaged = options.head_reduction == "mean"
        kl_shape = (batch, rows) if averaged else (batch, heads, rows)
        if teacher_lse is None:
            own_lse_shape = (batch, teacher_query.shape[1], rows)
    of_batch, of_row, of_head, _ = _contiguous_strides((batch, rows, heads, value_dim))
    output = (batch, heads, rows, value_dim), (of_batch, of_head, of_row, 1), query.dtype
    lse_shape = (batch, heads, rows)
    per_row = (kl_shape, lse_shape, own_lse_shape, (3, *lse_shape))
    return output, *((shape, _contiguous_strides(shape), torch.float32) for shape in per_row)


def _resolved_scale(name: str, scale: float | None, width: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(width)
    if not abs(scale) <= MAX_SCALE:
        raise InputRefusedError(f"{name} is {scale}, expected a number of at most {MAX_SCALE:g}")
    return scale


def _are_in_place(layouts: Layouts, group: int) -> bool:
    """Whether `_within_reach` would change nothing."""
    *student, teacher_query, teacher_key, teacher_lse, mask, seed = layouts
    in_place = all(is_in_reach(x.shape, x.strides) for x in student if x is not None)
    if teacher_query is not None and teacher_key is not None:
        in_place &= teacher_query.dtype == teacher_key.dtype
        in_place &= is_in_reach(teacher_query.shape, teacher_query.strides)
        in_place &= is_in_reach(teacher_key.shape, teacher_key.strides, group)
    if teacher_lse is not None:
        in_place &= teacher_lse.dtype == torch.float32 and _is_contiguous(teacher_lse)
    if mask is not None:
        in_place &= max(mask_strides(mask)[2:]) < FARTHEST_ROW
    return in_place and (seed is None or _is_contiguous(seed))


def _is_contiguous(layout: Layout) -> bool:
    expected = _contiguous_strides(layout.shape)
    every = zip(layout.shape, layout.strides, expected, strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in every)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _within_reach(operands: Operands, group: int) -> Operands:
    """The operands with copies of those that kernels cannot read where, or as, they are."""
    query, key, value, teacher_query, teacher_key, teacher_lse, mask, seed = operands
    if teacher_query is not None and teacher_key is not None:
        wide = torch.promote_types(teacher_query.dtype, teacher_key.dtype)
        teacher_query, teacher_key = in_reach(teacher_query.to(wide)), teacher_key.to(wide)
        teacher_key = in_reach(teacher_key, group)
    if mask is not None:
        strides = mask_strides(layout_of(mask))
        mask = mask.contiguous() if max(strides[2:]) >= FARTHEST_ROW else mask
    return Operands(
        in_reach(query),
        in_reach(key),
        in_reach(value),
        teacher_query,
        teacher_key,
        None if teacher_lse is None else teacher_lse.float().contiguous(),
        mask,
        seed if seed is None else seed.contiguous(),
    )


def in_reach(tensor: Tensor, group: int = 1) -> Tensor:
    """The [B, H, L, width] tensor if kernels can read it in place, else a copy."""
    if is_in_reach(tensor.shape, tensor.stride(), group):
        return tensor
    return _empty_in_reach(tensor).copy_(tensor)


def writable(result: Tensor) -> Tensor:
    """The [B, H, L, width] result if kernels can write it in place, else a scratch to copy from."""
    if is_in_reach(result.shape, result.stride()):
        return result
    return _empty_in_reach(result)


def _empty_in_reach(like: Tensor) -> Tensor:
    if like.shape[3] > 1:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return like.new_empty((*like.shape[:3], 2))[..., : like.shape[3]]  # see is_in_reach


def row_values(tensor: Tensor | None, expected: tuple[int, ...], query: Tensor) -> Tensor | None:
    """A per-row tensor as contiguous float32; None if it is empty.

    Raises:
        InputError: it has another shape or device.
    """
    if tensor is None or tensor.shape == (0,):
        return None
    check_shape("a per-row tensor", tensor, expected)
    check_device("a per-row tensor", tensor, query)
    return tensor.float().contiguous()


def products_precision() -> str:
    """How products of float32 are computed: as torch.matmul's are on the device."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
