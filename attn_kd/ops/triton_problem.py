"""A call of the Triton operators as its kernels see it: checked, with strides in reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import MAX_HEAD_DIM
from attn_kd.ops.checks import DIVERGENCES, HEAD_REDUCTIONS, MAX_SCALE

# Elements between two rows beyond which an offset within a tile of 256 rows would not fit 32 bits.
_FARTHEST_ROW = 2**31 // 256


@dataclass(frozen=True)
class Problem:
    """One call: operands with unit last strides, and what follows from the arguments."""

    operands: Operands  # attn_mask with four dimensions, bytes in place of bool
    scale: float
    teacher_scale: float
    divergence: str  # "none" without a teacher
    average_heads: bool  # several, before the maps are compared
    per_head_kl: bool  # kl is [B, H, Lq], not [B, Lq]
    dropout_p: float

    @property
    def two_pass(self) -> bool:
        """Whether the divergence needs the maps themselves, which only a second pass has."""
        return self.average_heads or self.divergence not in ("none", "reverse_kl", "forward_kl")

    @property
    def sizes(self) -> dict[str, int]:
        """The kernels' arguments of that kind."""
        batch, heads, query_length, _ = self.operands.query.shape
        return {
            "batch_heads": batch * heads,
            "heads": heads,
            "query_length": query_length,
            "key_length": self.operands.key.shape[2],
        }

    @property
    def group(self) -> int:
        """How many of the teacher's keys belong to one of the student's."""
        teacher_key = self.operands.teacher_key
        return 1 if teacher_key is None else teacher_key.shape[2] // self.operands.key.shape[2]

    @property
    def kl_shape(self) -> tuple[int, ...]:
        """[B, H, Lq], of head-averaged maps [B, Lq], without a teacher [0]."""
        batch, heads, rows, _ = self.operands.query.shape
        if self.divergence == "none":
            return (0,)
        return (batch, heads, rows) if self.per_head_kl else (batch, rows)


def make_problem(operands: Operands, options: Options) -> Problem:
    """Check a call and describe it.

    The public functions have explained what does not fit before this is called; what remains is
    that nothing is read past its end.

    Raises:
        InputError: the arguments do not fit together.
    """
    query, key, value, teacher_query, teacher_key, teacher_lse, mask, seed = operands
    _check_student(query, key, value)
    _check_options(options)
    if (teacher_query is None) != (teacher_key is None):
        raise InputError("teacher_query and teacher_key come together")
    scale = _resolved_scale("scale", options.scale, query)
    teacher_scale, averaged, several = 1.0, False, False
    if teacher_query is not None and teacher_key is not None:
        averaged = options.head_reduction == "mean"
        several = max(query.shape[1], teacher_query.shape[1]) > 1
        _check_teacher(operands, averaged)
        teacher_scale = _resolved_scale("teacher_scale", options.teacher_scale, teacher_query)
        wide = torch.promote_types(teacher_query.dtype, teacher_key.dtype)
        teacher_query, teacher_key = in_reach(teacher_query.to(wide)), teacher_key.to(wide)
        teacher_key = in_reach(teacher_key, teacher_key.shape[2] // key.shape[2])
    if mask is not None:
        mask = _mask(mask, query, key, teacher_query)
    _check_seed(seed, options.dropout_p, query)
    normal = Operands(
        in_reach(query),
        in_reach(key),
        in_reach(value),
        teacher_query,
        teacher_key,
        None if teacher_lse is None else teacher_lse.float().contiguous(),
        mask,
        seed if seed is None else seed.contiguous(),
    )
    return Problem(
        normal,
        scale,
        teacher_scale,
        "none" if teacher_query is None else options.divergence,
        averaged and several,
        not averaged,
        options.dropout_p,
    )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], query: Tensor) -> None:
    """Check a tensor's shape and device.

    Raises:
        InputError: one differs.
    """
    if tensor.shape != expected:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.device != query.device:
        raise InputError(f"{name} is on {tensor.device} but query is on {query.device}")


def row_values(tensor: Tensor | None, expected: tuple[int, ...], query: Tensor) -> Tensor | None:
    """A per-row tensor as contiguous float32; None if it is empty.

    Raises:
        InputError: it has another shape.
    """
    if tensor is None or tensor.shape == (0,):
        return None
    check_shape("a per-row tensor", tensor, expected, query)
    return tensor.float().contiguous()


def _check_student(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dim() == key.dim() == value.dim() == 4:
        raise InputError("query, key and value must have 4 dimensions")
    batch, heads, _, head_dim = query.shape
    keys = key.shape[2]
    check_shape("key", key, (batch, heads, keys, head_dim), query)
    check_shape("value", value, (batch, heads, keys, value.shape[3]), query)
    if query.numel() == 0 or key.numel() == 0:
        raise InputError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}, "
            "expected no empty dimension"
        )
    _check_width("query", query)
    _check_width("value", value)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError("query, key and value must have one dtype")
    _check_dtype("query", query)


def _check_teacher(operands: Operands, averaged: bool) -> None:
    query, key, _, teacher_query, teacher_key, teacher_lse, *_ = operands
    assert teacher_query is not None and teacher_key is not None
    if teacher_query.dim() != 4 or teacher_key.dim() != 4:
        raise InputError("teacher_query and teacher_key must have 4 dimensions")
    batch, heads, rows, _ = query.shape
    heads = teacher_query.shape[1] if averaged else heads
    group = max(1, teacher_key.shape[2] // key.shape[2])
    width = teacher_query.shape[3]
    check_shape("teacher_query", teacher_query, (batch, heads, rows, width), query)
    check_shape("teacher_key", teacher_key, (batch, heads, group * key.shape[2], width), query)
    if teacher_query.numel() == 0:
        raise InputError(
            f"teacher_query has shape {tuple(teacher_query.shape)}, expected no empty dimension"
        )
    _check_width("teacher_query", teacher_query)
    for name in ("teacher_query", "teacher_key"):
        _check_dtype(name, getattr(operands, name))
    if teacher_lse is not None:
        check_shape("teacher_lse, a per-row tensor,", teacher_lse, (batch, heads, rows), query)
        if teacher_lse.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"teacher_lse is {teacher_lse.dtype}, expected torch.float32")


def _check_options(options: Options) -> None:
    if options.divergence not in DIVERGENCES:
        raise InputError(f"divergence '{options.divergence}' is unknown")
    if options.head_reduction not in HEAD_REDUCTIONS:
        raise InputError(f"head_reduction '{options.head_reduction}' is unknown")
    if not 0.0 <= options.dropout_p < 1.0:
        raise InputError(f"dropout_p is {options.dropout_p}, expected a probability in [0, 1)")


def _check_width(name: str, tensor: Tensor) -> None:
    if tensor.shape[3] > MAX_HEAD_DIM:
        raise InputError(f"{name} has width {tensor.shape[3]}, expected at most {MAX_HEAD_DIM}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")


def _check_seed(seed: Tensor | None, dropout_p: float, query: Tensor) -> None:
    if dropout_p == 0.0:
        return
    if seed is None or seed.dtype != torch.int64 or seed.shape != (2,):
        raise InputError("dropout_p > 0 needs a dropout_seed of int64 [2]")
    check_shape("dropout_seed", seed, (2,), query)


def _resolved_scale(name: str, scale: float | None, query: Tensor) -> float:
    if scale is None:
        return 1.0 / math.sqrt(query.shape[3])
    if not abs(scale) <= MAX_SCALE:
        raise InputError(f"{name} is {scale}, expected a number of at most {MAX_SCALE:g}")
    return scale


def in_reach(tensor: Tensor, group: int = 1) -> Tensor:
    """The tensor if its last stride is 1 and its rows lie within reach of 32 bits, else a copy.

    A tile of keys that stand for groups of rows reaches that many times as far.
    """
    reach = group * tensor.stride(2)
    if (tensor.stride(3) == 1 or tensor.shape[3] <= 1) and reach < _FARTHEST_ROW:
        return tensor
    return tensor.contiguous()


def _mask(mask: Tensor, query: Tensor, key: Tensor, teacher_query: Tensor | None) -> Tensor:
    """The mask as a [B, H, Lq, Lk] view whose broadcast dimensions have size 1 or stride 0."""
    full = (*query.shape[:3], key.shape[2])
    fits = mask.dim() <= 4 and all(
        size in (1, want) for size, want in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise InputError(
            f"attn_mask has shape {tuple(mask.shape)}, expected one that broadcasts to {full}"
        )
    check_shape("attn_mask", mask, mask.shape, query)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask is {mask.dtype}, expected torch.bool or a floating dtype")
    mask = mask[(None,) * (4 - mask.dim())]
    one_for_all = mask.shape[1] == 1 or mask.stride(1) == 0
    if teacher_query is not None and teacher_query.shape[1] != query.shape[1] and not one_for_all:
        raise InputError(
            f"attn_mask has shape {tuple(mask.shape)}, expected one mask for all heads where "
            "teacher and student have different numbers of them"
        )
    if max(mask_strides(mask)[2:]) >= _FARTHEST_ROW:
        mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def mask_strides(mask: Tensor) -> tuple[int, ...]:
    """The strides of a mask, 0 where it is broadcast."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )


def products_precision() -> str:
    """How products of float32 are computed: as torch.matmul's are on the device."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
