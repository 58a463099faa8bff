"""What a kernel is given: tensors with their strides, sizes and scales; rows read and written."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Operand(NamedTuple):
    """A [B, H, L, width] tensor with unit last stride; data is None where there is none.

    256 rows of it span less than 2**31 elements (attn_kd/ops/triton_problem.py sees to that), so
    that offsets within a tile fit 32 bits; where a tile begins is counted in 64.
    """

    data: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any


class Mask(NamedTuple):
    """A mask as [B, H, Lq, Lk], strides 0 where it is broadcast; bytes if it is a bool one."""

    data: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    column_stride: Any


class Student(NamedTuple):
    """`Operand`s; value.data is None where only the divergence is wanted."""

    query: Any  # [B, H, Lq, D]
    key: Any  # [B, H, Lk, D]
    value: Any  # [B, H, Lk, Dv]


class Teacher(NamedTuple):
    """`Operand`s, data None without a teacher; lse is None where it is to be computed."""

    query: Any  # [B, H, Lq, Dt]
    key: Any  # [B, H, G * Lk, Dt]
    lse: Any  # contiguous float32 [B, H, Lq], natural


class Sizes(NamedTuple):
    """The numbers of things."""

    batch_heads: Any  # B * H
    heads: Any  # H
    query_length: Any  # Lq
    key_length: Any  # Lk


class Scales(NamedTuple):
    """Factors: of the student's and the teacher's base-2 logits, and of gradients of the first."""

    student: Any  # scale * log2(e)
    teacher: Any  # teacher_scale * log2(e)
    gradient: Any  # scale


class Head(NamedTuple):
    """One head of an `Operand`, [L, width]."""

    data: Any
    row_stride: Any


class HeadMask(NamedTuple):
    """One head of a `Mask`, [Lq, Lk]."""

    data: Any
    row_stride: Any
    column_stride: Any


class Keys(NamedTuple):
    """What one head's queries meet; what the variant does without is something else's."""

    key: Any
    value: Any
    teacher_key: Any
    mask: Any


@triton.jit
def head_of(operand, b, h):
    """Head `h` of batch entry `b` of an `Operand`."""
    at = tl.cast(b, tl.int64) * operand.batch_stride + tl.cast(h, tl.int64) * operand.head_stride
    return Head(operand.data + at, operand.row_stride)


@triton.jit
def keys_of(student, teacher, mask, b, h, V: tl.constexpr):
    """Head `h` of batch entry `b` of the key side of all operands."""
    key = head_of(student.key, b, h)
    value, teacher_key, head_mask = key, key, HeadMask(key.data, 0, 0)
    if V.value_dim > 0:
        value = head_of(student.value, b, h)
    if V.teacher_dim > 0:
        teacher_key = head_of(teacher.key, b, h)
    if V.masked:
        at = tl.cast(b, tl.int64) * mask.batch_stride + tl.cast(h, tl.int64) * mask.head_stride
        head_mask = HeadMask(mask.data + at, mask.row_stride, mask.column_stride)
    return Keys(key, value, teacher_key, head_mask)


@triton.jit
def load_rows(
    head,
    first_row,
    valid,  # [ROWS] bool; the others read as 0
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,  # all rows are valid
):
    """[ROWS, COLUMNS] from first_row on, zeros beyond WIDTH."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start = head.data + tl.cast(first_row, tl.int64) * head.row_stride
    at = start + (rows[:, None] * head.row_stride + columns[None, :])
    if WHOLE and WIDTH == COLUMNS:
        tile = tl.load(at)
    elif WHOLE:
        tile = tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)
    elif WIDTH == COLUMNS:
        tile = tl.load(at, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=valid[:, None] & (columns[None, :] < WIDTH), other=0.0)
    return tile


@triton.jit
def store_rows(
    head,
    first_row,
    valid,  # [ROWS] bool
    tile,  # [ROWS, COLUMNS]
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the tile's valid rows and first WIDTH columns, rounded to what the tensor holds."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start = head.data + tl.cast(first_row, tl.int64) * head.row_stride
    at = start + (rows[:, None] * head.row_stride + columns[None, :])
    tile = tile.to(head.data.dtype.element_ty)
    tl.store(at, tile, mask=valid[:, None] & (columns[None, :] < WIDTH))
