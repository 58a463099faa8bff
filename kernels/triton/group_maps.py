"""Averages of attention maps over heads, and what the kernels of single heads read of them.

Every head has a part in the slopes phi' (see `separable`) of averaged maps, and these have a part
in every head's gradient. `group_slopes_kernel` writes the slopes of a `Window` of the averaged maps
to a scratch, and the kernels of `two_pass_forward` and `two_pass_backward`, of one head a program
as in one pass, read their tiles from there. The scratch is of bounded size whatever the lengths,
8 MiB, which stays in the L2 cache; the windows of a call follow each other in it
(attn_kd/ops/triton_two_pass.py). So nothing of size Lq * Lk is stored, but of maps no larger than
the bound all slopes are there at once, averaged over the heads.

Two other ways were weighed. To average anew for each head takes H times an average's products. One
program for all heads of a block of queries (or keys) averages in both backward kernels: 11 products
and 6 exponentials a pair and head where these take 2 + 3 + 4 = 9 and 4. It has the accumulators of
all heads, 64 KiB of 8 heads, 64 rows and head_dim 32, a fourth of a multiprocessor's registers, or
adds to memory at every tile. And there are few of them: 34 at B = 2 and 1064 tokens, 66 at B = 1
and 4200 tokens, for 108 to 148 multiprocessors; of a window there, each backward kernel has 136 and
176. The price is 4 bytes a pair and head that both backward kernels, and one forward, read from the
L2 cache. All of this is counted, not measured: no GPU has run it yet.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
from attn_kd.kernels.triton.separable import slope, value
from attn_kd.kernels.triton.tiles import MASKED, load_mask

# What changes between calls of one shape class and windows of one call.
UNSPECIALIZED = (
    "batch_heads",
    "heads",
    "teacher_heads",
    "query_length",
    "key_length",
    "batch",
    "query",
    "queries",
    "key",
    "keys",
    "part_count",
    "part_rows",
)


class Window(NamedTuple):
    """Slopes of averaged maps: [entries, rows, columns] of them from (batch, query, key) on.

    Rows and columns are as many as whole tiles of every kernel have, so that tiles are read and
    written without a mask. Of the maps of single heads data is None: their slopes are computed
    where they are used.
    """

    data: Any  # float32
    row_stride: Any  # the number of columns
    entry_stride: Any
    batch: Any
    query: Any
    queries: Any
    key: Any
    keys: Any


class Average(NamedTuple):
    """A sum of maps, kept as mass * 2^highest."""

    highest: Any
    mass: Any


@triton.jit
def window_tile(window, b, first_row, first_key, V: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Pointers to a tile [block_q, block_k] of batch entry b, or to it transposed."""
    start = window.data + tl.cast(b - window.batch, tl.int64) * window.entry_stride
    start += tl.cast(first_row - window.query, tl.int64) * window.row_stride
    start += first_key - window.key
    rows, keys = tl.arange(0, V.block_q), tl.arange(0, V.block_k)
    if KEYS_FIRST:
        at = rows[None, :] * window.row_stride + keys[:, None]
    else:
        at = rows[:, None] * window.row_stride + keys[None, :]
    return start + at


@triton.jit
def place_in(window, heads, first, length, BLOCK: tl.constexpr):
    """Batch entry, head and block of a program; those of a head are next to each other.

    Blocks divide `length` queries or keys from `first` on.
    """
    blocks = tl.cdiv(length, BLOCK)
    entry_and_head = tl.program_id(0) // blocks
    b, h = window.batch + entry_and_head // heads, entry_and_head % heads
    return b, h, first + tl.program_id(0) % blocks * BLOCK


@triton.jit
def no_maps(V: tl.constexpr):
    """The sum of no maps."""
    highest = tl.full([V.block_q, V.block_k], MASKED, tl.float32)
    return Average(highest, tl.zeros([V.block_q, V.block_k], tl.float32))


@triton.jit
def with_map(average, log_map):
    """The sum with one map more, for one exponential a pair."""
    difference = log_map - average.highest
    smaller = tl.exp2(-tl.abs(difference))
    mass = tl.where(difference > 0, average.mass * smaller + 1.0, average.mass + smaller)
    return Average(tl.maximum(average.highest, log_map), mass)


@triton.jit
def student_average(
    student, teacher, mask, state, b, first_row, first_key, sizes, scale, V: tl.constexpr
):
    """log2 of the average over the student's heads, [block_q, block_k]."""
    valid = first_row + tl.arange(0, V.block_q) < sizes.query_length
    exist = first_key + tl.arange(0, V.block_k) < sizes.key_length
    average = no_maps(V)
    for h in tl.range(0, sizes.heads):
        rows = load_student_rows(student, state, b, h, first_row, valid, sizes, V)
        keys = keys_of(student, teacher, mask, b, h, V)
        key = load_rows(keys.key, first_key, exist, V.head_dim, V.block_k, V.head_block, False)
        visible, bias = load_pair_mask(keys.mask, first_row, first_key, sizes, V, False)
        _, log_map = student_map(rows, key, visible, bias, scale, V, False)
        average = with_map(average, log_map)
    return average.highest + tl.log2(average.mass / sizes.heads)


@triton.jit
def teacher_average(
    student,
    teacher,
    mask,
    lse_rest,
    heads,
    b,
    first_row,
    first_key,
    sizes,
    scale,
    V: tl.constexpr,
):
    """log2 of the average over the teacher's heads, [block_q, block_k]."""
    valid = first_row + tl.arange(0, V.block_q) < sizes.query_length
    average = no_maps(V)
    for h in tl.range(0, heads):
        rows = load_teacher_rows(teacher, lse_rest, heads, b, h, first_row, valid, sizes, V)
        # Unequal numbers of heads share one mask, whose head stride is 0.
        keys = keys_of(student, teacher, mask, b, h, V)
        visible, bias = load_pair_mask(keys.mask, first_row, first_key, sizes, V, False)
        log_map = teacher_log_map(
            rows, keys.teacher_key, first_key, visible, bias, sizes, scale, V, False
        )
        average = with_map(average, log_map)
    return average.highest + tl.log2(average.mass / heads)


@triton.jit
def shows_a_key(student, teacher, mask, b, first_key, sizes, V: tl.constexpr):
    """Whether any head sees one of the tile's keys, by a mask per key."""
    shown = tl.full([], 0, tl.int32)
    for h in tl.range(0, tl.where(mask.head_stride == 0, 1, sizes.heads)):
        keys = keys_of(student, teacher, mask, b, h, V)
        visible, _ = load_mask(keys.mask, 0, first_key, sizes, V, WHOLE=False)
        shown = tl.maximum(shown, tl.max(visible.to(tl.int32)))
    return shown > 0


@triton.jit(do_not_specialize=UNSPECIALIZED)
def group_slopes_kernel(
    student: Student,
    teacher: Teacher,
    mask: Mask,
    state,  # [3, B, H, Lq]
    teacher_lse_rest,  # [B, Ht, Lq] or None
    slopes,  # of the window, to be filled
    row_stride,
    entry_stride,
    kl_parts,  # [entries, part_count, rows]: each key block's of the divergence, or None
    part_count,
    scales: Scales,
    batch_heads,
    heads,
    teacher_heads,
    query_length,
    key_length,
    batch,
    query,
    queries,
    key,
    keys,
    V: tl.constexpr,
):
    """Grid: the window's tiles, key blocks fastest, then query blocks, then batch entries."""
    window = Window(slopes, row_stride, entry_stride, batch, query, queries, key, keys)
    sizes = Sizes(batch_heads, heads, query_length, key_length)
    key_blocks, query_blocks = tl.cdiv(keys, V.block_k), tl.cdiv(queries, V.block_q)
    column = tl.program_id(0) % key_blocks * V.block_k
    row = tl.program_id(0) // key_blocks % query_blocks * V.block_q
    entry = tl.program_id(0) // key_blocks // query_blocks
    b, first_row, first_key = batch + entry, query + row, key + column
    slopes_tile = tl.zeros([V.block_q, V.block_k], tl.float32)
    part = tl.zeros([V.block_q], tl.float32)
    shown = True
    if V.mask_per_key:
        shown = shows_a_key(student, teacher, mask, b, first_key, sizes, V)
    if shown:
        log_a = student_average(
            *(student, teacher, mask, state),
            *(b, first_row, first_key, sizes, scales.student, V),
        )
        log_b = teacher_average(
            *(student, teacher, mask, teacher_lse_rest, teacher_heads),
            *(b, first_row, first_key, sizes, scales.teacher, V),
        )
        slopes_tile = slope(log_a, log_b, V)
        if kl_parts is not None:
            part = tl.sum(value(log_a, log_b, V), 1)
    tl.store(window_tile(window, b, first_row, first_key, V, False), slopes_tile)
    if kl_parts is not None:
        parts = kl_parts + (tl.cast(entry, tl.int64) * part_count + column // V.block_k) * queries
        tl.store(parts + row + tl.arange(0, V.block_q), part)
