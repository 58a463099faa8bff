"""Tiles of attention maps whose rows' sums are known, as logarithms in base 2.

A tile is [block_q, block_k] or, with KEYS_FIRST, transposed, for what is summed over the queries.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kd.kernels.triton.operands import head_of, load_rows
from attn_kd.kernels.triton.tiles import (
    LOG2E,
    MASKED,
    group_shift,
    load_mask,
    load_teacher_keys,
    masked_logits,
    merge_groups,
    pair_logits,
)


class StudentRows(NamedTuple):
    """A block of a student's head's query rows: log2 of a probability is (logit - start) + rest.

    In two numbers, because one would round off digits of every logit.
    """

    query: Any  # [block_q, head_block], zeros where the row sees no key
    start: Any  # [block_q], the origin
    rest: Any  # [block_q], log2 of the inverse sum, or 0
    inverse_sum: Any  # [block_q], 0 where the row sees no key


class TeacherRows(NamedTuple):
    """Likewise of a teacher's head."""

    query: Any  # [block_q, teacher_block]
    start: Any
    rest: Any


@triton.jit
def load_student_rows(student, state, b, h, first_row, valid, sizes, V: tl.constexpr):
    """A block of rows of head h of batch entry b; `state` is row_state, [3, B, H, Lq]."""
    head = tl.cast(b, tl.int64) * sizes.heads + h
    at = head * sizes.query_length + first_row + tl.arange(0, V.block_q)
    plane = tl.cast(sizes.batch_heads, tl.int64) * sizes.query_length
    # Beyond the last row so high that every exponential is 0, whatever the bias.
    origin = tl.load(state + at, mask=valid, other=-MASKED)
    inverse_sum = tl.load(state + plane + at, mask=valid, other=0.0)
    if V.masked:
        valid = valid & (inverse_sum != 0.0)
    query = load_rows(
        head_of(student.query, b, h), first_row, valid, V.head_dim, V.block_q, V.head_block, False
    )
    rest = tl.log2(tl.where(inverse_sum != 0.0, inverse_sum, 1.0))
    return StudentRows(query, origin, rest, inverse_sum)


@triton.jit
def load_teacher_rows(teacher, lse_rest, heads, b, h, first_row, valid, sizes, V: tl.constexpr):
    """A block of rows of head h of `heads`.

    lse_rest, [B, Ht, Lq], is what rounding dropped of the LSEs, or None where that is not known.
    """
    query = load_rows(
        *(head_of(teacher.query, b, h), first_row, valid),
        *(V.teacher_dim, V.block_q, V.teacher_block, False),
    )
    head = tl.cast(b, tl.int64) * heads + h
    at = head * sizes.query_length + first_row + tl.arange(0, V.block_q)
    lse = tl.load(teacher.lse + at, mask=valid, other=0.0)
    exact = lse.to(tl.float64)
    if lse_rest is not None:
        exact += tl.load(lse_rest + at, mask=valid, other=0.0)
    # A row that sees no key has no LSE, and no visible pair to need one.
    base_2 = tl.where(lse == -float("inf"), 0.0, exact * LOG2E - group_shift(V))
    start = base_2.to(tl.float32)
    rest = (start - base_2).to(tl.float32)
    return TeacherRows(query, tl.where(valid, start, -MASKED), rest)


@triton.jit
def along_rows(x, KEYS_FIRST: tl.constexpr):
    """What every row has, [block_q], beside a tile."""
    return tl.expand_dims(x, 0 if KEYS_FIRST else 1)


@triton.jit
def seen_keys(mask, first_key, sizes, V: tl.constexpr):
    """[block_k] bool: the keys that exist, less those that a mask of keys alone hides.

    What these hold, NaN of padding perhaps, must not reach a product.
    """
    if V.mask_per_key:
        visible, _ = load_mask(mask, 0, first_key, sizes, V, WHOLE=False)
        seen = tl.reshape(visible, [V.block_k])
    else:
        seen = first_key + tl.arange(0, V.block_k) < sizes.key_length
    return seen


@triton.jit
def load_pair_mask(mask, first_row, first_key, sizes, V: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """`load_mask` of a tile of either orientation."""
    visible, bias = load_mask(mask, first_row, first_key, sizes, V, WHOLE=False)
    if KEYS_FIRST:
        visible, bias = tl.trans(visible), tl.trans(bias)
    return visible, bias


@triton.jit
def student_map(rows, key, visible, bias, scale, V: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """A student's head's map and its logarithm; `key` is [block_k, head_block]."""
    logits = pair_logits(rows.query, key, scale, V, KEYS_FIRST)
    logits = logits - along_rows(rows.start, KEYS_FIRST)
    logits = masked_logits(logits, visible, bias, V, WHOLE=False)
    a = tl.exp2(logits) * along_rows(rows.inverse_sum, KEYS_FIRST)
    return a, logits + along_rows(rows.rest, KEYS_FIRST)


@triton.jit
def teacher_log_map(
    rows,
    teacher_key,  # a Head
    first_key,
    visible,
    bias,
    sizes,
    scale,
    V: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """The logarithm of a teacher's head's map, of groups of its keys together."""
    exist = first_key + tl.arange(0, V.block_k) < sizes.key_length
    key = load_teacher_keys(teacher_key, first_key, 0, exist, V, False)
    logits = pair_logits(rows.query, key, scale, V, KEYS_FIRST)
    if V.group > 1:
        logits = merge_groups(
            *(logits, rows.query, teacher_key, first_key, exist, scale, V, False, KEYS_FIRST)
        )
    logits = logits - along_rows(rows.start, KEYS_FIRST)
    logits = masked_logits(logits, visible, bias, V, WHOLE=False)
    return logits + along_rows(rows.rest, KEYS_FIRST)
