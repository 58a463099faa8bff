"""Backward pass of the divergences that need the maps themselves (see `two_pass_forward`).

Two kernels, of one head a program: the gradient of a block of query rows, which runs over the keys
and leaves the rows' offsets to the other; the gradients of a block of keys and values, which runs
over the query rows. With the slopes phi' of the pair's head, or of the average of H,
    dS = a (dP + offset) + factor a phi',  factor = g or g / H,  offset = g_lse - dO.o - factor c
    dq = scale sum_j dS k,  dk = scale sum_i dS q,  dv = sum_i a dO
No sum is shared between programs: no atomics, the same bits every time. The windows of averaged
maps follow each other, and what one adds to the gradients of its queries and keys is added to what
those before have stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kd.kernels.triton.group_maps import UNSPECIALIZED, Window, place_in, window_tile
from attn_kd.kernels.triton.known_maps import (
    StudentRows,
    TeacherRows,
    along_rows,
    load_pair_mask,
    load_student_rows,
    load_teacher_rows,
    seen_keys,
    student_map,
    teacher_log_map,
)
from attn_kd.kernels.triton.operands import (
    Mask,
    Operand,
    Scales,
    Sizes,
    Student,
    Teacher,
    head_of,
    keys_of,
    load_rows,
    store_rows,
)
from attn_kd.kernels.triton.philox import Noise, kept_pairs
from attn_kd.kernels.triton.separable import slope, weighted_slope
from attn_kd.kernels.triton.tiles import add_product, product
from attn_kd.kernels.triton.visible_span import none_if_hidden, visible_span


class GradientRows(NamedTuple):
    """A block of one head's query rows, and what arrives at them."""

    b: Any
    head: Any  # b * H + h
    first: Any
    student: StudentRows
    teacher: TeacherRows  # of single heads; else something else
    grad_output: Any  # [block_q, value_block], zeros in rows that see no key
    factor: Any  # [block_q]


class KeyBlock(NamedTuple):
    """A block of one head's keys."""

    first: Any
    seen: Any  # [block_k] bool, as `seen_keys` has them
    key: Any  # [block_k, head_block], zeros where none may be seen
    value: Any  # [block_k, value_block], likewise


@triton.jit
def load_gradient_rows(
    student,
    teacher,
    state,
    window,
    grad_output,
    grad_kl,
    kl_share,
    b,
    h,
    first_row,
    sizes,
    V: tl.constexpr,
):
    """The block of rows from first_row on."""
    rows = first_row + tl.arange(0, V.block_q)
    valid = rows < sizes.query_length
    known = load_student_rows(student, state, b, h, first_row, valid, sizes, V)
    # No gradient comes of a row that sees no key, not even of NaN.
    seeing = valid & (known.inverse_sum != 0.0)
    grad, teacher_rows = known.query, known
    if V.value_dim > 0:
        grad = load_rows(
            *(head_of(grad_output, b, h), first_row, seeing),
            *(V.value_dim, V.block_q, V.value_block, False),
        )
    head = tl.cast(b, tl.int64) * sizes.heads + h
    if window.data is None:
        teacher_rows = load_teacher_rows(
            teacher, None, sizes.heads, b, h, first_row, valid, sizes, V
        )
        group = head
    else:
        group = tl.cast(b, tl.int64)
    factor = tl.load(grad_kl + group * sizes.query_length + rows, mask=seeing, other=0.0)
    factor = factor * kl_share
    return GradientRows(b, head, first_row, known, teacher_rows, grad, factor)


@triton.jit
def load_key_block(keys, first_key, sizes, V: tl.constexpr):
    """The block of keys from first_key on."""
    seen = seen_keys(keys.mask, first_key, sizes, V)
    key = load_rows(keys.key, first_key, seen, V.head_dim, V.block_k, V.head_block, False)
    value = key
    if V.value_dim > 0:
        value = load_rows(keys.value, first_key, seen, V.value_dim, V.block_k, V.value_block, False)
    return KeyBlock(first_key, seen, key, value)


@triton.jit
def pair_gradients(
    rows,
    offset,
    block,
    keys,
    window,
    noise,
    sizes,
    scales,
    V: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """A tile's dS, and what of the map reached the output."""
    visible, bias = load_pair_mask(keys.mask, rows.first, block.first, sizes, V, KEYS_FIRST)
    a, log_a = student_map(rows.student, block.key, visible, bias, scales.student, V, KEYS_FIRST)
    if window.data is None:
        log_b = teacher_log_map(
            *(rows.teacher, keys.teacher_key, block.first, visible, bias),
            *(sizes, scales.teacher, V, KEYS_FIRST),
        )
        slopes = slope(log_a, log_b, V)
    else:
        slopes = tl.load(window_tile(window, rows.b, rows.first, block.first, V, KEYS_FIRST))
    grad = along_rows(rows.factor, KEYS_FIRST) * weighted_slope(a, log_a, slopes, V)
    grad_probability = along_rows(offset, KEYS_FIRST)
    kept = a
    if V.value_dim > 0:
        if KEYS_FIRST:
            through_output = product(block.value, tl.trans(rows.grad_output), V)
        else:
            through_output = product(rows.grad_output, tl.trans(block.value), V)
        if V.dropout:
            keeps = kept_pairs(noise, rows.head, rows.first, block.first, V)
            if KEYS_FIRST:
                keeps = tl.trans(keeps)
            through_output = tl.where(keeps, through_output * noise.keep_factor, 0.0)
            kept = tl.where(keeps, a * noise.keep_factor, 0.0)
        grad_probability = through_output + grad_probability
    return grad + a * grad_probability, kept


@triton.jit
def load_offset(rows, output, grad_lse, state, sizes, h, V: tl.constexpr):
    """What of dS / a no key changes, [block_q]."""
    row = rows.first + tl.arange(0, V.block_q)
    valid = row < sizes.query_length
    at = rows.head * sizes.query_length + row
    plane = tl.cast(sizes.batch_heads, tl.int64) * sizes.query_length
    offset = -rows.factor * tl.load(state + 2 * plane + at, mask=valid, other=0.0)
    if grad_lse is not None:
        seeing = valid & (rows.student.inverse_sum != 0.0)
        offset += tl.load(grad_lse + at, mask=seeing, other=0.0)
    if V.value_dim > 0:
        result = load_rows(
            *(head_of(output, rows.b, h), rows.first, valid),
            *(V.value_dim, V.block_q, V.value_block, False),
        )
        offset -= tl.sum(rows.grad_output.to(tl.float32) * result.to(tl.float32), 1)
    return offset


@triton.jit
def add_rows(
    head,
    first_row,
    valid,
    tile,
    adds,  # to what is stored
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`store_rows`, or of what is stored and the tile the sum."""
    if adds:
        tile += load_rows(head, first_row, valid, WIDTH, ROWS, COLUMNS, False).to(tl.float32)
    store_rows(head, first_row, valid, tile, WIDTH, ROWS, COLUMNS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def two_pass_backward_rows_kernel(
    student: Student,
    teacher: Teacher,
    mask: Mask,
    noise: Noise,
    output: Operand,  # [B, H, Lq, Dv]
    grad_output: Operand,
    grad_kl,  # [B, H, Lq], of averaged maps [B, Lq]
    grad_lse,  # [B, H, Lq] or None
    state,  # [3, B, H, Lq]
    slopes,  # of the window of averaged maps, or None
    row_stride,
    entry_stride,
    grad_query: Operand,  # [B, H, Lq, D]
    offsets,  # [B, H, Lq], written for the other kernel
    kl_share,  # 1 / H of averaged maps, else 1
    scales: Scales,
    batch_heads,
    heads,
    query_length,
    key_length,
    batch,
    query,
    queries,
    key,
    keys,
    V: tl.constexpr,
):
    """Grid: the window's query blocks of one head, then those of the next."""
    window = Window(slopes, row_stride, entry_stride, batch, query, queries, key, keys)
    sizes = Sizes(batch_heads, heads, query_length, key_length)
    b, h, first_row = place_in(window, heads, query, queries, V.block_q)
    rows = load_gradient_rows(
        *(student, teacher, state, window, grad_output, grad_kl, kl_share),
        *(b, h, first_row, sizes, V),
    )
    valid = first_row + tl.arange(0, V.block_q) < query_length
    offset = load_offset(rows, output, grad_lse, state, sizes, h, V)
    at = rows.head * query_length + first_row + tl.arange(0, V.block_q)
    tl.store(offsets + at, offset, mask=valid)

    head_keys = keys_of(student, teacher, mask, b, h, V)
    total = tl.zeros([V.block_q, V.head_block], tl.float32)
    begin, end = visible_span(head_keys.mask, key, key + keys, V)
    for first_key in tl.range(begin, end, V.block_k):
        block = load_key_block(head_keys, first_key, sizes, V)
        grad, _ = pair_gradients(
            rows, offset, block, head_keys, window, noise, sizes, scales, V, False
        )
        total = add_product(total, grad.to(block.key.dtype), block.key, V)
    # Where a row sees no key, what NaN in keys made of its sum is not its gradient.
    total = tl.where(rows.student.inverse_sum[:, None] != 0.0, total * scales.gradient, 0.0)
    add_rows(
        *(head_of(grad_query, b, h), first_row, valid, total, key > 0),
        *(V.head_dim, V.block_q, V.head_block),
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def two_pass_backward_keys_kernel(
    student: Student,
    teacher: Teacher,
    mask: Mask,
    noise: Noise,
    grad_output: Operand,  # [B, H, Lq, Dv]
    grad_kl,  # [B, H, Lq], of averaged maps [B, Lq]
    state,  # [3, B, H, Lq]
    slopes,  # of the window of averaged maps, or None
    row_stride,
    entry_stride,
    offsets,  # [B, H, Lq]
    grad_key: Operand,  # [B, H, Lk, D]
    grad_value: Operand,  # [B, H, Lk, Dv]
    kl_share,  # 1 / H of averaged maps, else 1
    scales: Scales,
    batch_heads,
    heads,
    query_length,
    key_length,
    batch,
    query,
    queries,
    key,
    keys,
    V: tl.constexpr,
):
    """Grid: the window's key blocks of one head, then those of the next."""
    window = Window(slopes, row_stride, entry_stride, batch, query, queries, key, keys)
    sizes = Sizes(batch_heads, heads, query_length, key_length)
    b, h, first_key = place_in(window, heads, key, keys, V.block_k)
    head_keys = keys_of(student, teacher, mask, b, h, V)
    block = load_key_block(head_keys, first_key, sizes, V)
    rows_end = queries
    if V.mask_per_key:
        rows_end = none_if_hidden(queries, block.seen)
    total = tl.zeros([V.block_k, V.head_block], tl.float32)
    value_total = tl.zeros([V.block_k, V.value_block], tl.float32)
    for row in tl.range(0, rows_end, V.block_q):
        rows = load_gradient_rows(
            *(student, teacher, state, window, grad_output, grad_kl, kl_share),
            *(b, h, query + row, sizes, V),
        )
        at = query + row + tl.arange(0, V.block_q)
        offset = tl.load(offsets + rows.head * query_length + at, mask=at < query_length, other=0.0)
        grad, kept = pair_gradients(
            rows, offset, block, head_keys, window, noise, sizes, scales, V, True
        )
        total = add_product(total, grad.to(block.key.dtype), rows.student.query, V)
        if V.value_dim > 0:
            value_total = add_product(value_total, kept.to(block.value.dtype), rows.grad_output, V)
    # Nor is what NaN in rows made of the sums of keys that no row sees.
    total = tl.where(block.seen[:, None], total * scales.gradient, 0.0)
    value_total = tl.where(block.seen[:, None], value_total, 0.0)
    exist = first_key + tl.arange(0, V.block_k) < key_length
    add_rows(
        *(head_of(grad_key, b, h), first_key, exist, total, query > 0),
        *(V.head_dim, V.block_k, V.head_block),
    )
    if V.value_dim > 0:
        add_rows(
            *(head_of(grad_value, b, h), first_key, exist, value_total, query > 0),
            *(V.value_dim, V.block_k, V.value_block),
        )
