"""Tiles of the attention map: masks, and the base-2 logits of student and teacher."""

import triton
import triton.language as tl

from attn_kd.kernels.triton.operands import Head, load_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# The logit of a masked pair: finite, so that the difference of two masked logits is 0 and not NaN,
# yet so low that its exponential against any other logit is exactly 0.
MASKED = tl.constexpr(-1e30)

# An additive mask value up to this one hides the pair as -inf does (attn_kd/ops/reference.py).
HIDDEN_BIAS = tl.constexpr(-1e6)


@triton.jit
def read_mask(at, exists):
    """Which of the pairs at those pointers are visible, and their base-2 biases (0 of bool masks).

    Pairs that do not exist are hidden.
    """
    bias = tl.zeros([1, 1], tl.float32)
    if at.dtype.element_ty == tl.uint8:
        visible = tl.load(at, mask=exists, other=0) != 0
    else:
        natural = tl.load(at, mask=exists, other=-float("inf")).to(tl.float32)
        visible = (natural <= HIDDEN_BIAS) == 0  # in this form NaN stays visible
        bias = natural * LOG2E
    return visible, bias


@triton.jit
def load_mask(mask, first_row, first_key, sizes, V: tl.constexpr, WHOLE: tl.constexpr):
    """Which pairs of a tile are visible, and their base-2 biases (0 of bool masks).

    [block_q, block_k], or less where it broadcasts: [1, block_k] of a mask per key. WHOLE: all
    keys of the tile exist. Pairs beyond the lengths are hidden.
    """
    ROWS: tl.constexpr = 1 if V.mask_per_key else V.block_q
    rows, keys = tl.arange(0, ROWS), tl.arange(0, V.block_k)
    bias = tl.zeros([1, 1], tl.float32)
    if V.masked:
        start = mask.data + (
            tl.cast(first_row, tl.int64) * mask.row_stride
            + tl.cast(first_key, tl.int64) * mask.column_stride
        )
        at = start + (rows[:, None] * mask.row_stride + keys[None, :] * mask.column_stride)
        exists = (first_row + rows < sizes.query_length)[:, None] & (
            first_key + keys < sizes.key_length
        )[None, :]
        visible, bias = read_mask(at, exists)
    elif WHOLE:
        visible = tl.full([1, 1], True, tl.int1)
    else:
        visible = (first_key + keys < sizes.key_length)[None, :]
    return visible, bias


@triton.jit
def masked_logits(logits, visible, bias, V: tl.constexpr, WHOLE: tl.constexpr):
    """Logits plus biases, MASKED where the pair is hidden."""
    if V.masked:
        logits = tl.where(visible, logits + bias, MASKED)
    elif not WHOLE:
        logits = tl.where(visible, logits, MASKED)
    return logits


@triton.jit
def origin_of(max):
    """What to subtract from logits whose maximum is `max`: where nothing was visible yet, 0, which
    leaves masked logits low enough to vanish."""
    return tl.where(max == MASKED, 0.0, max)


@triton.jit
def product(left, right, V: tl.constexpr):
    """left @ right in float32; of 16-bit operands by tensor cores."""
    if V.interpreted:  # Triton's interpreter multiplies bfloat16 as if it were integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=V.precision)


@triton.jit
def add_product(total, left, right, V: tl.constexpr):
    """total + left @ right."""
    if V.interpreted:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=V.precision)


@triton.jit
def pair_logits(query, key, scale, V: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """scale * query @ key.T, [block_q, block_k], or transposed."""
    logits = product(key, tl.trans(query), V) if KEYS_FIRST else product(query, tl.trans(key), V)
    return logits * scale


@triton.jit
def load_teacher_keys(teacher_key, first_key, member, valid, V: tl.constexpr, WHOLE: tl.constexpr):
    """[block_k, teacher_block]: of every key's group of teacher keys the one numbered `member`."""
    members = Head(
        teacher_key.data + tl.cast(member, tl.int64) * teacher_key.row_stride,
        teacher_key.row_stride * V.group,
    )
    return load_rows(members, first_key, valid, V.teacher_dim, V.block_k, V.teacher_block, WHOLE)


@triton.jit
def load_keys(key, first_key, valid, visible, V: tl.constexpr, WHOLE: tl.constexpr):
    """[block_k, head_block]; zeros where a mask of keys alone hides them.

    What padding holds, NaN perhaps, must not reach a product that sums over keys, not even against
    a probability of 0.
    """
    if V.mask_per_key:
        seen = tl.reshape(visible, [V.block_k])
        keys = load_rows(key, first_key, seen, V.head_dim, V.block_k, V.head_block, False)
    else:
        keys = load_rows(key, first_key, valid, V.head_dim, V.block_k, V.head_block, WHOLE)
    return keys


@triton.jit
def load_values(value, first_key, valid, visible, V: tl.constexpr, WHOLE: tl.constexpr):
    """[block_k, value_block]; zeros where a mask of keys alone hides them, as in `load_keys`."""
    if V.mask_per_key:
        seen = tl.reshape(visible, [V.block_k])
        values = load_rows(value, first_key, seen, V.value_dim, V.block_k, V.value_block, False)
    else:
        values = load_rows(value, first_key, valid, V.value_dim, V.block_k, V.value_block, WHOLE)
    return values


@triton.jit
def teacher_logits(
    query,  # [block_q, teacher_block]
    teacher_key,  # a Head
    first_key,
    valid,  # [block_k] bool, the keys that exist
    scale,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The teacher's unmasked base-2 logits, [block_q, block_k]."""
    key = load_teacher_keys(teacher_key, first_key, 0, valid, V, WHOLE)
    logits = pair_logits(query, key, scale, V, False)
    if V.group > 1:
        logits = merge_groups(logits, query, teacher_key, first_key, valid, scale, V, WHOLE, False)
    return logits


@triton.jit
def merge_groups(
    logits,  # of the first member of every key's group
    query,
    teacher_key,
    first_key,
    valid,
    scale,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """The logits of groups of teacher keys, each of which stands for one key.

    A group's is that of its members' mean, log2(1/G sum_g 2^t_g); with it goes the teacher's LSE
    less log2 G (`group_shift`).
    """
    highest, mass = logits, tl.full(logits.shape, 1.0, tl.float32)
    for member in range(1, V.group):
        key = load_teacher_keys(teacher_key, first_key, member, valid, V, WHOLE)
        logits = pair_logits(query, key, scale, V, KEYS_FIRST)
        raised = tl.maximum(highest, logits)
        # A group of -inf alone has no mass; 0 keeps the differences from being NaN.
        base = tl.where(raised == -float("inf"), 0.0, raised)
        mass = mass * tl.exp2(highest - base) + tl.exp2(logits - base)
        highest = raised
    merged = highest + tl.log2(mass * (1.0 / V.group))
    return tl.where(highest == -float("inf"), highest, merged)


@triton.jit
def group_shift(V: tl.constexpr):
    """log2 G, in float64."""
    return tl.log2(tl.full([1], V.group, tl.float64))
