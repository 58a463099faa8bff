"""Forward pass: attention output, log-sum-exps and divergence of a block of query rows.

One pass over the keys. With the teacher's LSE given, `reverse_kl` costs one exponential a pair, as
plain attention does; else the teacher's running maximum and sum cost a second one. Without a value
there is no output, without a teacher no divergence: neither then costs anything.

Probabilities are measured from a row's origin, at first the highest logit that it has seen. Where
that grows, the origin follows and what has been summed up is rescaled: in every tile, or, if
`Variant.rescale_above` is not 0, in those alone where it grows by more than 2^rescale_above in one
of the block's rows, as in FlashAttention-4. Then p may exceed 1 by as much, and the origin lie as
far below the highest logit; row_state has the origin that was used, and nothing else depends on it.
Neither way has been timed on a GPU. To ask all rows of a block takes a maximum over its warps: as
compiled, a tile of 128 x 32 pairs takes 317 instructions a thread where nothing is rescaled and 310
where all is at head_dim 32 on sm_90 (374 and 356 on sm_80), but 349 and 359 at head_dim 64 (405 and
396). So those of 64 and 128 do, by 2^8, but not on sm_100, where Triton 3.7 compiles no such if;
at 256 and in float32, whose registers spill either way, it was not looked into.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kd.kernels.triton.divergence import moved_sum, row_correction, row_divergence, term
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
from attn_kd.kernels.triton.tiles import (
    LN2,
    LOG2E,
    MASKED,
    add_product,
    group_shift,
    load_mask,
    load_values,
    masked_logits,
    origin_of,
    pair_logits,
    teacher_logits,
)
from attn_kd.kernels.triton.visible_span import visible_span


class RowResults(NamedTuple):
    """Contiguous float32 [B, H, Lq] each, natural logarithms; None where nobody asks."""

    kl: Any
    lse: Any
    teacher_lse: Any
    teacher_lse_rest: Any  # what rounding dropped of teacher_lse
    state: Any  # [3, B, H, Lq]: origin, inverse sum, correction (csrc/cpu/problem.h)


class Rows(NamedTuple):
    """A block of one head's query rows."""

    head: Any  # b * H + h
    first: Any
    query: Any  # [block_q, head_block]
    teacher_query: Any  # [block_q, teacher_block]
    teacher_start: Any  # [block_q], what the teacher's logits are measured from: a given LSE, or 0


class Running(NamedTuple):
    """A running sum and what rounding has taken of it, [block_q] each."""

    sum: Any
    rest: Any  # 0 of 16-bit operands, whose own errors are larger


class Sums(NamedTuple):
    """The running sums of query rows, base 2, [block_q] each."""

    origin: Any  # highest logit seen, or less by rescale_above at most
    sum: Running  # of p = 2^(s - origin)
    weighted: Running  # of the divergence's terms
    teacher_max: Any  # the same for the teacher; 0 where its logits are measured from a given LSE
    teacher_sum: Running
    seen: Any  # 1 where the row has seen a key, which only a mask can hide
    output: Any  # [block_q, value_block], not yet divided by the sum


@triton.jit
def no_sums(V: tl.constexpr):
    """The sums before the first key."""
    zeros = tl.zeros([V.block_q], tl.float32)
    lowest = tl.full([V.block_q], MASKED, tl.float32)
    teacher_max = zeros if V.teacher_lse_given else lowest
    seen = tl.full([V.block_q], 0 if V.masked else 1, tl.int32)
    output = tl.zeros([V.block_q, V.value_block], tl.float32)
    nothing = Running(zeros, zeros)
    return Sums(lowest, nothing, nothing, teacher_max, nothing, seen, output)


@triton.jit
def add_part(running, shrink, part, EXACT: tl.constexpr):
    """A running sum that shrinks by a factor, with a tile's part.

    If EXACT by Knuth's two-sum, so that errors do not grow with the number of keys: a divergence
    may be a small difference of large sums.
    """
    before = running.sum * shrink
    total = before + part
    rest = running.rest
    if EXACT:
        grown = total - before
        rest = rest * shrink + ((before - (total - grown)) + (part - grown))
    return Running(total, rest)


@triton.jit
def total_of(running):
    """A running sum in float64; an infinite one has lost nothing."""
    lost = tl.where(running.rest == running.rest, running.rest, 0.0)
    return running.sum.to(tl.float64) + lost.to(tl.float64)


@triton.jit
def add_terms(sums, p, s, origin, shrink, teacher, V: tl.constexpr, EXACT: tl.constexpr):
    """The weighted sum, and the teacher's maximum and sum, with a tile's terms.

    p and s [block_q, block_k] are the student's, `teacher` its teacher's masked logits.
    """
    b = p
    teacher_max, teacher_sum = sums.teacher_max, sums.teacher_sum
    teacher_shrink = tl.full([V.block_q], 1.0, tl.float32)
    if not V.teacher_lse_given:
        teacher_max = tl.maximum(sums.teacher_max, tl.max(teacher, 1))
        teacher_shrink = tl.exp2(sums.teacher_max - teacher_max)
        teacher = teacher - origin_of(teacher_max)[:, None]
    # Earlier terms were measured from earlier origins.
    shift = (sums.origin - origin) - (sums.teacher_max - teacher_max)
    moved = moved_sum(sums.weighted.sum, sums.sum.sum, teacher_sum.sum, shift, V)
    weighted = Running(moved, sums.weighted.rest)
    if V.teacher_probability or not V.teacher_lse_given:
        b = tl.exp2(teacher)
        teacher_sum = add_part(teacher_sum, teacher_shrink, tl.sum(b, 1), EXACT)
    terms = tl.sum(term(p, b, s - teacher, V), 1)
    weight_shrink = teacher_shrink if V.teacher_probability else shrink
    return add_part(weighted, weight_shrink, terms, EXACT), teacher_max, teacher_sum


@triton.jit
def add_tile(
    sums, rows, keys, noise, first_key, sizes, scales, V: tl.constexpr, WHOLE: tl.constexpr
):
    """The sums with block_k keys more, all of which exist if WHOLE."""
    EXACT: tl.constexpr = rows.query.dtype == tl.float32
    visible, bias = load_mask(keys.mask, rows.first, first_key, sizes, V, WHOLE)
    valid = first_key + tl.arange(0, V.block_k) < sizes.key_length
    key = load_rows(keys.key, first_key, valid, V.head_dim, V.block_k, V.head_block, WHOLE)
    logits = pair_logits(rows.query, key, scales.student, V, False)
    logits = masked_logits(logits, visible, bias, V, WHOLE)
    origin = tl.maximum(sums.origin, tl.max(logits, 1))
    if V.rescale_above > 0:
        # One answer for all rows of the block.
        moves = tl.max(origin - sums.origin, 0) > V.rescale_above
        origin = tl.where(moves, origin, sums.origin)
    shrink = tl.exp2(sums.origin - origin)
    s = logits - origin_of(origin)[:, None]
    p = tl.exp2(s)

    weighted, teacher_max, teacher_sum = sums.weighted, sums.teacher_max, sums.teacher_sum
    if V.teacher_dim > 0:
        t = teacher_logits(
            rows.teacher_query, keys.teacher_key, first_key, valid, scales.teacher, V, WHOLE
        )
        t = masked_logits(t - rows.teacher_start[:, None], visible, bias, V, WHOLE)
        weighted, teacher_max, teacher_sum = add_terms(sums, p, s, origin, shrink, t, V, EXACT)
    output = sums.output
    if V.value_dim > 0:
        value = load_values(keys.value, first_key, valid, visible, V, WHOLE)
        kept = p
        if V.dropout:
            kept = tl.where(kept_pairs(noise, rows.head, rows.first, first_key, V), p, 0.0)
        if V.rescale_above == 0 or moves:  # here the fewest registers are in use
            output = output * shrink[:, None]
        output = add_product(output, kept.to(value.dtype), value, V)
    seen = sums.seen
    if V.masked:
        seen = tl.maximum(seen, tl.max(visible.to(tl.int32), 1))
    sum = add_part(sums.sum, shrink, tl.sum(p, 1), EXACT)
    return Sums(origin, sum, weighted, teacher_max, teacher_sum, seen, output)


@triton.jit
def load_given_lse(teacher, at, valid, V: tl.constexpr):
    """The teacher's LSE as its logits are measured from it, [block_q] float64, base 2."""
    natural = tl.load(teacher.lse + at, mask=valid, other=0.0)
    return natural.to(tl.float64) * LOG2E - group_shift(V)


@triton.jit
def store_divergence(results, sums, seen, log_sum, teacher, at, valid, V: tl.constexpr):
    """Write kl and the teacher's LSE; return the correction [block_q]."""
    # In float64: the divergence is a small difference of logarithms.
    teacher_sum = total_of(sums.teacher_sum)
    if V.teacher_lse_given:
        stored_lse = load_given_lse(teacher, at, valid, V)
        origin = stored_lse.to(tl.float32).to(tl.float64)
        teacher_log_sum = stored_lse - origin
    else:
        origin = sums.teacher_max.to(tl.float64)
        teacher_log_sum = tl.log2(teacher_sum)
        lse = LN2 * (origin + teacher_log_sum + group_shift(V))
        rounded = tl.where(seen, lse, -float("inf")).to(tl.float32)
        tl.store(results.teacher_lse + at, rounded, mask=valid)
        if results.teacher_lse_rest is not None:
            rest = (lse - rounded.to(tl.float64)).to(tl.float32)
            tl.store(results.teacher_lse_rest + at, rest, mask=valid)
        stored_lse = rounded.to(tl.float64) * LOG2E - group_shift(V)
    weighted, sum = total_of(sums.weighted), total_of(sums.sum)
    kl = LN2 * row_divergence(weighted, sum, teacher_sum, log_sum, teacher_log_sum, V)
    if results.kl is not None:
        tl.store(results.kl + at, tl.where(seen, kl, 0.0).to(tl.float32), mask=valid)
    return tl.where(seen, row_correction(weighted, sum, stored_lse - origin, V), 0.0)


@triton.jit
def store_row_results(results, sums, teacher, at, valid, sizes, V: tl.constexpr):
    """Write what is kept of every row; return the inverse sums [block_q]."""
    seen = sums.seen > 0
    sum = total_of(sums.sum)
    log_sum = tl.log2(sum)
    inverse_sum = tl.where(seen, 1.0 / sum, 0.0).to(tl.float32)
    lse = tl.where(seen, LN2 * (sums.origin.to(tl.float64) + log_sum), -float("inf"))
    correction = tl.zeros([V.block_q], tl.float64)
    if V.teacher_dim > 0:
        correction = store_divergence(results, sums, seen, log_sum, teacher, at, valid, V)
    tl.store(results.lse + at, lse.to(tl.float32), mask=valid)
    plane = tl.cast(sizes.batch_heads, tl.int64) * sizes.query_length
    tl.store(results.state + at, origin_of(sums.origin), mask=valid)
    tl.store(results.state + plane + at, inverse_sum, mask=valid)
    tl.store(results.state + 2 * plane + at, correction.to(tl.float32), mask=valid)
    return inverse_sum


@triton.jit
def load_row_block(student, teacher, b, h, head, first_row, at, valid, V: tl.constexpr):
    """The block of query rows from first_row on."""
    query = load_rows(
        head_of(student.query, b, h),
        first_row,
        valid,
        V.head_dim,
        V.block_q,
        V.head_block,
        WHOLE=False,
    )
    teacher_query, teacher_start = query, tl.zeros([V.block_q], tl.float32)
    if V.teacher_dim > 0:
        teacher_query = load_rows(
            head_of(teacher.query, b, h),
            first_row,
            valid,
            V.teacher_dim,
            V.block_q,
            V.teacher_block,
            WHOLE=False,
        )
        if V.teacher_lse_given:
            teacher_start = load_given_lse(teacher, at, valid, V).to(tl.float32)
    return Rows(head, first_row, query, teacher_query, teacher_start)


@triton.jit(do_not_specialize=["batch_heads", "heads", "query_length", "key_length"])
def forward_kernel(
    student: Student,
    teacher: Teacher,
    mask: Mask,
    noise: Noise,
    output: Operand,  # [B, H, Lq, Dv]
    results: RowResults,
    scales: Scales,
    batch_heads,
    heads,
    query_length,
    key_length,
    V: tl.constexpr,
):
    """Grid: B * H * ceil(Lq / block_q), the row blocks of a head one after the other."""
    sizes = Sizes(batch_heads, heads, query_length, key_length)
    row_blocks = tl.cdiv(sizes.query_length, V.block_q)
    head = tl.program_id(0) // row_blocks
    first_row = tl.program_id(0) % row_blocks * V.block_q
    b, h = head // sizes.heads, head % sizes.heads
    row = first_row + tl.arange(0, V.block_q)
    valid = row < sizes.query_length
    at = tl.cast(head, tl.int64) * sizes.query_length + row

    rows = load_row_block(student, teacher, b, h, head, first_row, at, valid, V)
    keys = keys_of(student, teacher, mask, b, h, V)
    sums = no_sums(V)
    begin, end = visible_span(keys.mask, 0, key_length, V)
    whole = end // V.block_k * V.block_k if V.whole_tiles else end
    for first_key in tl.range(begin, whole, V.block_k):
        sums = add_tile(sums, rows, keys, noise, first_key, sizes, scales, V, V.whole_tiles)
    if V.whole_tiles and whole < end:
        sums = add_tile(sums, rows, keys, noise, whole, sizes, scales, V, False)

    factor = store_row_results(results, sums, teacher, at, valid, sizes, V)
    if V.value_dim > 0:
        if V.dropout:
            factor = factor * noise.keep_factor
        # Where a row sees no key, what NaN in values made of its sum is not its output.
        result = tl.where(sums.seen[:, None] > 0, sums.output * factor[:, None], 0.0)
        store_rows(
            head_of(output, b, h), first_row, valid, result, V.value_dim, V.block_q, V.value_block
        )
