"""What the backward pass needs of a row whatever the key, computed once for all blocks of keys."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kd.kernels.triton.divergence import row_offset, row_slope, teacher_origin
from attn_kd.kernels.triton.operands import Operand, head_of, load_rows
from attn_kd.kernels.triton.tiles import LOG2E, MASKED, group_shift


class RowGradients(NamedTuple):
    """What arrives at the rows; contiguous float32 [B, H, Lq], None where nothing does."""

    kl: Any
    lse: Any


class RowConstants(NamedTuple):
    """Contiguous float32 [B, H, Lq], or a block of it shaped to broadcast against a tile."""

    origin: Any
    inverse_sum: Any
    offset: Any
    teacher_origin: Any
    slope: Any


@triton.jit(do_not_specialize=["batch_heads", "heads", "query_length", "key_length"])
def row_constants_kernel(
    output: Operand,  # [B, H, Lq, Dv]
    grad_output: Operand,
    grads: RowGradients,
    state,  # [3, B, H, Lq] of the forward pass
    teacher_lse,  # [B, H, Lq]
    constants,  # [3, B, H, Lq]: offset, teacher_origin, slope
    batch_heads,
    heads,
    query_length,
    key_length,
    V: tl.constexpr,
):
    """Grid: B * H * ceil(Lq / block_q). Rows that see no key get zeros."""
    row_blocks = tl.cdiv(query_length, V.block_q)
    head = tl.program_id(0) // row_blocks
    first_row = tl.program_id(0) % row_blocks * V.block_q
    b, h = head // heads, head % heads
    row = first_row + tl.arange(0, V.block_q)
    valid = row < query_length
    at = tl.cast(head, tl.int64) * query_length + row
    plane = tl.cast(batch_heads, tl.int64) * query_length
    seen = tl.load(state + plane + at, mask=valid, other=0.0) != 0.0

    offset = tl.zeros([V.block_q], tl.float64)
    if grads.lse is not None:
        offset += tl.load(grads.lse + at, mask=valid, other=0.0).to(tl.float64)
    if V.value_dim > 0:
        out = load_output_rows(output, b, h, first_row, valid, V, WHOLE=False)
        grad = load_output_rows(grad_output, b, h, first_row, valid, V, WHOLE=False)
        offset -= tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1).to(tl.float64)
    if V.teacher_dim > 0:
        # In float64: what is rounded here is common to all keys of the row.
        grad = tl.load(grads.kl + at, mask=valid, other=0.0).to(tl.float64)
        correction = tl.load(state + 2 * plane + at, mask=valid, other=0.0).to(tl.float64)
        lse = tl.load(teacher_lse + at, mask=valid, other=0.0).to(tl.float64) * LOG2E
        lse -= group_shift(V)
        origin = tl.where(seen, teacher_origin(lse, correction, V), 0.0).to(tl.float32)
        moved = origin.to(tl.float64) - lse
        offset += row_offset(grad, correction, moved, V)
        slope = tl.where(seen, row_slope(grad, moved, V), 0.0)
        tl.store(constants + plane + at, origin, mask=valid)
        tl.store(constants + 2 * plane + at, slope.to(tl.float32), mask=valid)
    tl.store(constants + at, tl.where(seen, offset, 0.0).to(tl.float32), mask=valid)


@triton.jit
def load_output_rows(operand, b, h, first_row, valid, V: tl.constexpr, WHOLE: tl.constexpr):
    """[block_q, value_block] of the output or its gradient."""
    return load_rows(
        head_of(operand, b, h), first_row, valid, V.value_dim, V.block_q, V.value_block, WHOLE
    )


@triton.jit
def load_constants(
    state, constants, head, first_row, sizes, V: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """A block of rows' constants.

    Beyond the last row zeros, but origins so high that every exponential is 0, whatever the bias.
    """
    row = first_row + tl.arange(0, V.block_q)
    valid = row < sizes.query_length
    at = tl.cast(head, tl.int64) * sizes.query_length + row
    plane = tl.cast(sizes.batch_heads, tl.int64) * sizes.query_length
    origin = tl.load(state + at, mask=valid, other=-MASKED)
    inverse_sum = tl.load(state + plane + at, mask=valid, other=0.0)
    offset = tl.load(constants + at, mask=valid, other=0.0)
    origin_of_teacher, slope = offset, offset
    if V.teacher_dim > 0:
        origin_of_teacher = tl.load(constants + plane + at, mask=valid, other=-MASKED)
        slope = tl.load(constants + 2 * plane + at, mask=valid, other=0.0)
    AXIS: tl.constexpr = 0 if KEYS_FIRST else 1
    return RowConstants(
        tl.expand_dims(origin, AXIS),
        tl.expand_dims(inverse_sum, AXIS),
        tl.expand_dims(offset, AXIS),
        tl.expand_dims(origin_of_teacher, AXIS),
        tl.expand_dims(slope, AXIS),
    )
