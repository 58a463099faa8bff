"""Backward pass of one sweep: gradients of query, key and value.

Two kernels after that of `row_constants`: the gradients of a block of keys and values, which runs
over the query rows, and the gradient of a block of query rows, which runs over the keys. Both
compute the same tiles, and no sum is shared between programs: no atomics, the same bits every time.

Per pair, with a row's origin and inverse sum from the forward pass:
    a = 2^(s - origin) * inverse_sum,  dS = a (dP + offset + slope u)   (see `divergence`)
    dq = scale sum_j dS k,  dk = scale sum_i dS q,  dv = sum_i a dO
a and dS are rounded to the operands' dtype for these products alone.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kd.kernels.triton.divergence import grad_logit
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
from attn_kd.kernels.triton.row_constants import load_constants, load_output_rows
from attn_kd.kernels.triton.tiles import (
    add_product,
    load_keys,
    load_mask,
    load_teacher_keys,
    load_values,
    masked_logits,
    merge_groups,
    pair_logits,
    product,
    teacher_logits,
)
from attn_kd.kernels.triton.visible_span import none_if_hidden, visible_span


@triton.jit
def grad_logits(logits, teacher, grad_probability, rows, V: tl.constexpr):
    """The tile's map a and the gradient dS of its logits; all of one shape, rows broadcast.

    logits and teacher are masked, the teacher's measured from its origin already; grad_probability
    is that of the undropped map.
    """
    s = logits - rows.origin
    a = tl.exp2(s) * rows.inverse_sum
    grad_probability = grad_probability + rows.offset
    if V.teacher_dim > 0:
        grad = grad_logit(a, teacher, s - teacher, grad_probability, rows.slope, V)
    else:
        grad = a * grad_probability
    return a, grad


@triton.jit(do_not_specialize=["batch_heads", "heads", "query_length", "key_length"])
def backward_rows_kernel(
    student: Student,
    teacher: Teacher,
    mask: Mask,
    noise: Noise,
    grad_output: Operand,  # [B, H, Lq, Dv]
    grad_query: Operand,  # [B, H, Lq, D]
    state,  # [3, B, H, Lq] of the forward pass
    constants,  # [3, B, H, Lq] of `row_constants_kernel`
    scales: Scales,
    batch_heads,
    heads,
    query_length,
    key_length,
    V: tl.constexpr,
):
    """Grid: B * H * ceil(Lq / block_q), a block of query rows each."""
    sizes = Sizes(batch_heads, heads, query_length, key_length)
    row_blocks = tl.cdiv(query_length, V.block_q)
    head = tl.program_id(0) // row_blocks
    first_row = tl.program_id(0) % row_blocks * V.block_q
    b, h = head // heads, head % heads
    valid = first_row + tl.arange(0, V.block_q) < query_length
    block = load_row_block(student, teacher, grad_output, b, h, first_row, valid, V, WHOLE=False)
    rows = load_constants(state, constants, head, first_row, sizes, V, KEYS_FIRST=False)
    keys = keys_of(student, teacher, mask, b, h, V)
    grad = tl.zeros([V.block_q, V.head_block], tl.float32)
    begin, end = visible_span(keys.mask, 0, key_length, V)
    whole = end // V.block_k * V.block_k if V.whole_tiles else end
    for first_key in tl.range(begin, whole, V.block_k):
        grad = add_keys(
            *(grad, block, rows, keys, noise, head, first_row, first_key),
            *(sizes, scales, V, V.whole_tiles),
        )
    if V.whole_tiles and whole < end:
        grad = add_keys(
            grad, block, rows, keys, noise, head, first_row, whole, sizes, scales, V, False
        )
    # Where a row sees no key, NaN in what it was multiplied by is not its gradient.
    grad = tl.where(rows.inverse_sum != 0.0, grad * scales.gradient, 0.0)
    store_rows(
        head_of(grad_query, b, h), first_row, valid, grad, V.head_dim, V.block_q, V.head_block
    )


class RowBlock(NamedTuple):
    """Operands of a block of query rows; what the variant does without is something else's."""

    query: Any  # [block_q, head_block]
    teacher_query: Any  # [block_q, teacher_block]
    grad_output: Any  # [block_q, value_block]


@triton.jit
def load_row_block(
    student,
    teacher,
    grad_output,
    b,
    h,
    first_row,
    valid,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The operands of the query rows from first_row on."""
    query_head = head_of(student.query, b, h)
    query = load_rows(query_head, first_row, valid, V.head_dim, V.block_q, V.head_block, WHOLE)
    teacher_query, grad = query, query
    if V.teacher_dim > 0:
        teacher_head = head_of(teacher.query, b, h)
        teacher_query = load_rows(
            teacher_head, first_row, valid, V.teacher_dim, V.block_q, V.teacher_block, WHOLE
        )
    if V.value_dim > 0:
        grad = load_output_rows(grad_output, b, h, first_row, valid, V, WHOLE)
    return RowBlock(query, teacher_query, grad)


@triton.jit
def add_keys(
    grad,  # [block_q, head_block]
    block,
    rows,
    keys,
    noise,
    head,
    first_row,
    first_key,
    sizes,
    scales,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The gradient of the queries (less its scale) with block_k keys more."""
    visible, bias = load_mask(keys.mask, first_row, first_key, sizes, V, WHOLE)
    valid = first_key + tl.arange(0, V.block_k) < sizes.key_length
    key = load_keys(keys.key, first_key, valid, visible, V, WHOLE)
    logits = pair_logits(block.query, key, scales.student, V, False)
    logits = masked_logits(logits, visible, bias, V, WHOLE)
    t = logits
    if V.teacher_dim > 0:
        t = teacher_logits(
            block.teacher_query, keys.teacher_key, first_key, valid, scales.teacher, V, WHOLE
        )
        t = masked_logits(t - rows.teacher_origin, visible, bias, V, WHOLE)
    grad_probability = tl.zeros([V.block_q, V.block_k], tl.float32)
    if V.value_dim > 0:
        value = load_values(keys.value, first_key, valid, visible, V, WHOLE)
        grad_probability = product(block.grad_output, tl.trans(value), V)
        if V.dropout:
            kept = kept_pairs(noise, head, first_row, first_key, V)
            grad_probability = tl.where(kept, grad_probability * noise.keep_factor, 0.0)
    _, grad_s = grad_logits(logits, t, grad_probability, rows, V)
    return add_product(grad, grad_s.to(key.dtype), key, V)


class KeyBlock(NamedTuple):
    """Operands of a block of keys; what the variant does without is something else's."""

    first: Any
    valid: Any  # [block_k] bool, the keys that exist
    visible: Any  # [1, block_k] of a mask per key
    bias: Any
    key: Any  # [block_k, head_block]
    value: Any  # [block_k, value_block]
    member_0: Any  # [block_k, teacher_block], the first teacher key of every group


@triton.jit
def load_key_block(keys, first_key, sizes, V: tl.constexpr):
    """The operands of the keys from first_key on."""
    valid = first_key + tl.arange(0, V.block_k) < sizes.key_length
    visible, bias = tl.full([1, 1], True, tl.int1), tl.zeros([1, 1], tl.float32)
    if V.mask_per_key:
        visible, bias = load_mask(keys.mask, 0, first_key, sizes, V, WHOLE=False)
    key = load_keys(keys.key, first_key, valid, visible, V, WHOLE=False)
    value, member_0 = key, key
    if V.value_dim > 0:
        value = load_values(keys.value, first_key, valid, visible, V, WHOLE=False)
    if V.teacher_dim > 0:
        member_0 = load_teacher_keys(keys.teacher_key, first_key, 0, valid, V, WHOLE=False)
    return KeyBlock(first_key, valid, visible, bias, key, value, member_0)


@triton.jit
def add_rows(
    grad_key,  # [block_k, head_block]
    grad_value,  # [block_k, value_block]
    keys,
    block,  # of keys
    queries,  # a RowBlock
    rows,
    noise,
    head,
    first_row,
    sizes,
    scales,
    V: tl.constexpr,
):
    """The gradients of keys and values (less their factors) with block_q query rows more.

    Tiles are [block_k, block_q]. Rows that do not exist have an inverse sum and a slope of 0, and
    the gradients of keys that do not exist are not stored: neither needs a mask.
    """
    visible, bias = block.visible, block.bias
    if V.masked and not V.mask_per_key:
        visible, bias = load_mask(keys.mask, first_row, block.first, sizes, V, WHOLE=False)
    visible, bias = tl.trans(visible), tl.trans(bias)
    logits = pair_logits(queries.query, block.key, scales.student, V, True)
    logits = masked_logits(logits, visible, bias, V, WHOLE=True)
    t = logits
    if V.teacher_dim > 0:
        t = pair_logits(queries.teacher_query, block.member_0, scales.teacher, V, True)
        if V.group > 1:
            t = merge_groups(
                t,
                queries.teacher_query,
                keys.teacher_key,
                block.first,
                block.valid,
                scales.teacher,
                V,
                WHOLE=False,
                KEYS_FIRST=True,
            )
        t = masked_logits(t - rows.teacher_origin, visible, bias, V, WHOLE=True)
    grad_probability = tl.zeros([V.block_k, V.block_q], tl.float32)
    if V.value_dim > 0:
        grad_probability = product(block.value, tl.trans(queries.grad_output), V)
    kept = tl.full([1, 1], True, tl.int1)
    if V.dropout:
        kept = tl.trans(kept_pairs(noise, head, first_row, block.first, V))
        grad_probability = tl.where(kept, grad_probability * noise.keep_factor, 0.0)
    a, grad_s = grad_logits(logits, t, grad_probability, rows, V)
    if V.value_dim > 0:
        if V.dropout:
            a = tl.where(kept, a, 0.0)
        grad_output = queries.grad_output
        grad_value = add_product(grad_value, a.to(grad_output.dtype), grad_output, V)
    grad_key = add_product(grad_key, grad_s.to(queries.query.dtype), queries.query, V)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["batch_heads", "heads", "query_length", "key_length"])
def backward_keys_kernel(
    student: Student,
    teacher: Teacher,
    mask: Mask,
    noise: Noise,
    grad_output: Operand,  # [B, H, Lq, Dv]
    grad_key: Operand,  # [B, H, Lk, D]
    grad_value: Operand,  # [B, H, Lk, Dv]
    state,  # [3, B, H, Lq] of the forward pass
    constants,  # [3, B, H, Lq] of `row_constants_kernel`
    scales: Scales,
    batch_heads,
    heads,
    query_length,
    key_length,
    V: tl.constexpr,
):
    """Grid: B * H * ceil(Lk / block_k), a block of keys each."""
    sizes = Sizes(batch_heads, heads, query_length, key_length)
    key_blocks = tl.cdiv(key_length, V.block_k)
    head = tl.program_id(0) // key_blocks
    first_key = tl.program_id(0) % key_blocks * V.block_k
    b, h = head // heads, head % heads
    keys = keys_of(student, teacher, mask, b, h, V)
    block = load_key_block(keys, first_key, sizes, V)
    grad_k = tl.zeros([V.block_k, V.head_block], tl.float32)
    grad_v = tl.zeros([V.block_k, V.value_block], tl.float32)
    rows_end = query_length
    if V.mask_per_key:
        rows_end = none_if_hidden(query_length, block.visible)
    for first_row in tl.range(0, rows_end, V.block_q):
        rows = load_constants(state, constants, head, first_row, sizes, V, KEYS_FIRST=True)
        valid = first_row + tl.arange(0, V.block_q) < query_length
        if V.masked and not V.mask_per_key:
            # Rows that see no key give nothing, whatever they hold or arrives at them.
            valid = valid & (tl.reshape(rows.inverse_sum, [V.block_q]) != 0.0)
        queries = load_row_block(
            student, teacher, grad_output, b, h, first_row, valid, V, WHOLE=False
        )
        grad_k, grad_v = add_rows(
            grad_k, grad_v, keys, block, queries, rows, noise, head, first_row, sizes, scales, V
        )
    grad_k *= scales.gradient
    if V.dropout:
        grad_v *= noise.keep_factor
    if V.mask_per_key:  # the same of keys that no row sees
        grad_k = tl.where(tl.trans(block.visible), grad_k, 0.0)
        grad_v = tl.where(tl.trans(block.visible), grad_v, 0.0)
    store_rows(
        head_of(grad_key, b, h), first_key, block.valid, grad_k, V.head_dim, V.block_k, V.head_block
    )
    if V.value_dim > 0:
        store_rows(
            head_of(grad_value, b, h),
            first_key,
            block.valid,
            grad_v,
            V.value_dim,
            V.block_k,
            V.value_block,
        )
