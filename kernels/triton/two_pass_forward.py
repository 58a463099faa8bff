"""Second forward pass of the divergences that need the maps themselves.

These are js and mse, and all of them on maps averaged over heads. The first pass (`forward`) has
left every row's output, LSE, origin and inverse sum, and the teacher's LSE. Of single heads,
`two_pass_forward_kernel` computes divergence and correction together; of averaged maps,
`group_slopes_kernel` has computed each key block's part of the divergence in a window of them. Left
are the sum of these, which the first head's programs take, and each head's correction
    c_h = sum_j a_hj phi'_j
window by window, each of a row's adding to what those before have stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kd.kernels.triton.group_maps import UNSPECIALIZED, Window, place_in, window_tile
from attn_kd.kernels.triton.known_maps import (
    load_pair_mask,
    load_student_rows,
    load_teacher_rows,
    student_map,
    teacher_log_map,
)
from attn_kd.kernels.triton.operands import (
    Mask,
    Scales,
    Sizes,
    Student,
    Teacher,
    keys_of,
    load_rows,
)
from attn_kd.kernels.triton.separable import slope, value, weighted_slope
from attn_kd.kernels.triton.visible_span import visible_span


class MapSums(NamedTuple):
    """The running sums of query rows, [block_q] each."""

    divergence: Any  # of single heads
    correction: Any


@triton.jit
def add_tile(
    sums, rows, teacher_rows, keys, window, b, first_row, first_key, sizes, scales, V: tl.constexpr
):
    """The sums with block_k keys more."""
    exist = first_key + tl.arange(0, V.block_k) < sizes.key_length
    visible, bias = load_pair_mask(keys.mask, first_row, first_key, sizes, V, False)
    key = load_rows(keys.key, first_key, exist, V.head_dim, V.block_k, V.head_block, False)
    a, log_a = student_map(rows, key, visible, bias, scales.student, V, False)
    divergence = sums.divergence
    if window.data is None:
        log_b = teacher_log_map(
            *(teacher_rows, keys.teacher_key, first_key, visible, bias),
            *(sizes, scales.teacher, V, False),
        )
        divergence += tl.sum(value(log_a, log_b, V), 1)
        slopes = slope(log_a, log_b, V)
    else:
        slopes = tl.load(window_tile(window, b, first_row, first_key, V, False))
    return MapSums(divergence, sums.correction + tl.sum(weighted_slope(a, log_a, slopes, V), 1))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def two_pass_forward_kernel(
    student: Student,
    teacher: Teacher,
    mask: Mask,
    teacher_lse_rest,  # [B, H, Lq] or None
    slopes,  # of the window of averaged maps, or None
    row_stride,
    entry_stride,
    kl_parts,  # of averaged maps, [entries, part_count, part_rows], or None
    part_count,
    part_rows,
    kl,  # [B, H, Lq], of averaged maps [B, Lq]
    state,  # [3, B, H, Lq]: origin and inverse sum are read, the correction is written
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
    rows = first_row + tl.arange(0, V.block_q)
    valid = rows < query_length
    at = (tl.cast(b, tl.int64) * heads + h) * query_length + rows
    correction_at = state + 2 * tl.cast(batch_heads, tl.int64) * query_length + at
    known = load_student_rows(student, state, b, h, first_row, valid, sizes, V)
    head_keys = keys_of(student, teacher, mask, b, h, V)

    teacher_rows = known
    divergence = tl.zeros([V.block_q], tl.float32)
    correction = tl.zeros([V.block_q], tl.float32)
    if slopes is None:
        teacher_rows = load_teacher_rows(
            teacher, teacher_lse_rest, heads, b, h, first_row, valid, sizes, V
        )
    elif key > 0:
        correction = tl.load(correction_at, mask=valid, other=0.0)
    sums = MapSums(divergence, correction)
    begin, end = visible_span(head_keys.mask, key, key + keys, V)
    for first_key in tl.range(begin, end, V.block_k):
        sums = add_tile(
            *(sums, known, teacher_rows, head_keys, window),
            *(b, first_row, first_key, sizes, scales, V),
        )
    tl.store(correction_at, sums.correction, mask=valid)
    divergence = sums.divergence
    if kl_parts is None:
        tl.store(kl + at, divergence, mask=valid)
    elif h == 0:
        kl_at = kl + tl.cast(b, tl.int64) * query_length + rows
        if key > 0:
            divergence = tl.load(kl_at, mask=valid, other=0.0)
        parts = kl_parts + tl.cast(b - batch, tl.int64) * part_count * part_rows
        parts += first_row - query
        for part in tl.range(0, part_count):
            parts_at = parts + part * part_rows + tl.arange(0, V.block_q)
            divergence += tl.load(parts_at, mask=valid, other=0.0)
        tl.store(kl_at, divergence, mask=valid)
