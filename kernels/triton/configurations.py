"""Which tiles a kernel works on, by width, dtype, architecture and how much work there is.

A table, no tuning at run time. Nothing here was run on a GPU: the entries follow from registers and
shared memory, which the tests read from the compiled kernels, and from what tiles read through the
L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiling(NamedTuple):
    """Rows and keys of a tile, and how a program works through them."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    # The forward pass rescales its sums where the highest logit of a row grows by more than this,
    # in powers of 2; 0: whenever it grows (kernels/triton/forward.py).
    rescale_above: int = 0
    # The last tile of keys, where not all of them exist, is computed apart, so that the others need
    # no mask; of calls with a mask never.
    last_apart: bool = False


class Extras(NamedTuple):
    """What a variant computes beside what all do: each takes registers."""

    mask_of_pairs: bool = False
    dropout: bool = False
    js: bool = False


PLAIN = Extras()

# Where Triton interprets: large tiles, since an operation takes as long on a small one.
INTERPRETED = Tiling(128, 128, 4, 1, last_apart=True)

WIDTHS = (32, 64, 128, 256)  # classes of the widest of D, Dv and Dt
KERNELS = (
    "forward",
    "backward_keys",
    "backward_rows",
    "group_slopes",
    "two_pass_forward",
    "two_pass_backward_keys",
    "two_pass_backward_rows",
)

# Multiprocessors of an A100, an H100 and a B200; of others as of an A100.
_MULTIPROCESSORS = {8: 108, 9: 132, 10: 148}

# What the programs of a kernel share out between them.
_SHARED_OUT = {"forward": "block_q", "backward_rows": "block_q", "backward_keys": "block_k"}

# Along which a program of a kernel goes, a block at a time.
_PASSED_BY = {
    "forward": "block_k",
    "backward_keys": "block_q",
    "backward_rows": "block_k",
    "group_slopes": "block_k",
    "two_pass_forward": "block_k",
    "two_pass_backward_keys": "block_q",
    "two_pass_backward_rows": "block_k",
}

# Whose loops load as far ahead with dropout and a mask of pairs as without.
_STAGES_KEPT = ("backward_rows", "group_slopes", "two_pass_forward", "two_pass_backward_rows")

# By kernel and class of width, for operands of 16 bits. Triton gives every warp rows of its own (or
# keys, for the gradients of keys), 16 at least: more warps than that repeat each other.
_HALF = {
    ("forward", 32): Tiling(128, 32, 8, 3),
    ("forward", 64): Tiling(128, 32, 8, 3, 8),
    ("forward", 128): Tiling(128, 32, 8, 2, 8),
    ("forward", 256): Tiling(64, 32, 8, 2),
    ("backward_keys", 32): Tiling(32, 128, 8, 2),
    ("backward_keys", 64): Tiling(32, 128, 8, 2),
    ("backward_keys", 128): Tiling(16, 64, 4, 2),
    ("backward_keys", 256): Tiling(32, 32, 8, 1),
    ("backward_rows", 32): Tiling(128, 32, 8, 3),
    ("backward_rows", 64): Tiling(128, 32, 8, 2),
    ("backward_rows", 128): Tiling(64, 32, 4, 2),
    ("backward_rows", 256): Tiling(32, 32, 8, 1),
    ("group_slopes", 32): Tiling(128, 64, 8, 2),
    ("group_slopes", 64): Tiling(64, 64, 4, 2),
    ("group_slopes", 128): Tiling(64, 32, 4, 2),
    ("group_slopes", 256): Tiling(32, 32, 8, 1),
    ("two_pass_forward", 32): Tiling(64, 64, 4, 2),
    ("two_pass_forward", 64): Tiling(64, 64, 4, 2),
    ("two_pass_forward", 128): Tiling(64, 32, 4, 2),
    ("two_pass_forward", 256): Tiling(32, 32, 8, 1),
    ("two_pass_backward_keys", 32): Tiling(32, 64, 4, 2),
    ("two_pass_backward_keys", 64): Tiling(16, 64, 4, 3),
    ("two_pass_backward_keys", 128): Tiling(16, 64, 4, 2),
    ("two_pass_backward_keys", 256): Tiling(32, 32, 8, 1),
    ("two_pass_backward_rows", 32): Tiling(64, 32, 4, 2),
    ("two_pass_backward_rows", 64): Tiling(64, 32, 4, 2),
    ("two_pass_backward_rows", 128): Tiling(64, 32, 4, 2),
    ("two_pass_backward_rows", 256): Tiling(32, 32, 8, 1),
}

# The same where any operand is float32. Not tuned: no tensor core computes IEEE products, and
# Triton unrolls them over the whole width with the operands in registers, so that some of these
# kernels spill (bench/results/kernel-resources.md).
_FLOAT = {
    ("forward", 32): Tiling(32, 32, 8, 1),
    ("forward", 64): Tiling(16, 32, 8, 1),
    ("forward", 128): Tiling(32, 32, 8, 1),
    ("forward", 256): Tiling(16, 32, 8, 1),
    ("backward_keys", 32): Tiling(32, 64, 8, 1),
    ("backward_keys", 64): Tiling(32, 32, 8, 1),
    ("backward_keys", 128): Tiling(32, 32, 8, 1),
    ("backward_keys", 256): Tiling(16, 16, 8, 1),
    ("backward_rows", 32): Tiling(32, 32, 8, 1),
    ("backward_rows", 64): Tiling(16, 32, 8, 1),
    ("backward_rows", 128): Tiling(32, 32, 8, 1),
    ("backward_rows", 256): Tiling(16, 16, 8, 1),
    ("group_slopes", 32): Tiling(32, 32, 8, 1),
    ("group_slopes", 64): Tiling(32, 32, 8, 1),
    ("group_slopes", 128): Tiling(32, 32, 8, 1),
    ("group_slopes", 256): Tiling(32, 32, 8, 1),
    ("two_pass_forward", 32): Tiling(32, 32, 8, 1),
    ("two_pass_forward", 64): Tiling(32, 32, 8, 1),
    ("two_pass_forward", 128): Tiling(32, 32, 8, 1),
    ("two_pass_forward", 256): Tiling(32, 32, 8, 1),
    ("two_pass_backward_keys", 32): Tiling(32, 32, 8, 1),
    ("two_pass_backward_keys", 64): Tiling(32, 32, 8, 1),
    ("two_pass_backward_keys", 128): Tiling(32, 32, 8, 1),
    ("two_pass_backward_keys", 256): Tiling(16, 16, 8, 1),
    ("two_pass_backward_rows", 32): Tiling(32, 32, 8, 1),
    ("two_pass_backward_rows", 64): Tiling(32, 32, 8, 1),
    ("two_pass_backward_rows", 128): Tiling(32, 32, 8, 1),
    ("two_pass_backward_rows", 256): Tiling(16, 16, 8, 1),
}


def tiling(
    kernel: str,
    widest: int,
    itemsize: int,
    architecture: int,
    heads: int,
    length: int,
    extras: Extras = PLAIN,
) -> Tiling:
    """Return the tiling of a kernel.

    Args:
        kernel: one of KERNELS.
        widest: of D, Dv and Dt.
        itemsize: bytes of an element of the widest dtype among the operands.
        architecture: 80, 90, 100 and so on; 0 for Triton's interpreter.
        heads: B * H.
        length: of what the programs of a head share out: Lq, or Lk for the gradients of keys.
        extras: what the variant computes besides.
    """
    if architecture == 0:
        return INTERPRETED
    width = next(width for width in WIDTHS if widest <= width)
    chosen = (_HALF if itemsize == 2 else _FLOAT)[kernel, width]
    if itemsize == 2:
        chosen = _with_fewer_registers(chosen, kernel, width, architecture, extras)
        chosen = chosen._replace(last_apart=_computes_last_apart(kernel, width, architecture))
    if _generation(architecture) == 10:
        # Of the accumulator in tensor memory Triton 3.7 compiles no branch.
        chosen = chosen._replace(rescale_above=0)
    return _with_more_programs(chosen, kernel, architecture, heads, length)


def _computes_last_apart(kernel: str, width: int, architecture: int) -> bool:
    """Whether two loops, of whole tiles and of the last, fit the registers.

    What both multiply stays there: on sm_80 the forward pass at a width of 32 took 161 registers
    so, and takes 128, for twice the resident warps, with one loop. On sm_100 that of plain
    attention would spill.
    """
    generation = _generation(architecture)
    if generation not in (9, 10) or kernel not in ("forward", "backward_rows"):
        return False
    return (kernel, width, generation) != ("forward", 32, 10)


def _generation(architecture: int) -> int:
    """The compute capability's first number: sm_103 is as sm_100."""
    return architecture // 10


def _with_fewer_registers(
    chosen: Tiling, kernel: str, width: int, architecture: int, extras: Extras
) -> Tiling:
    """Half as many keys (or queries) at a time where their products would not fit the registers.

    On sm_80 and consumer GPUs tensor cores take every operand from registers.
    """
    if not _is_heavy(kernel, width, _generation(architecture), extras):
        return chosen
    axis = _PASSED_BY[kernel]
    crowded = extras.dropout and (extras.mask_of_pairs or kernel == "backward_keys")
    if crowded and kernel not in _STAGES_KEPT:
        chosen = chosen._replace(num_stages=max(1, chosen.num_stages - 1))
    return chosen._replace(**{axis: max(16, getattr(chosen, axis) // 2)})


def _is_heavy(kernel: str, width: int, generation: int, extras: Extras) -> bool:
    """Whether a variant would spill by the tables' own tilings."""
    pairs, dropout, js = extras
    if kernel in ("group_slopes", "two_pass_forward"):
        return pairs or (kernel == "group_slopes" and generation == 10)
    if generation in (9, 10):
        return pairs and ((width >= 64 and (dropout or generation == 10)) or (dropout and js))
    dropout = dropout and kernel == "backward_keys"
    return width >= 128 or (width == 64 and (pairs or js or dropout)) or (pairs and dropout)


def _with_more_programs(
    chosen: Tiling, kernel: str, architecture: int, heads: int, length: int
) -> Tiling:
    """Blocks of half the size, by half the warps, where large ones leave multiprocessors idle."""
    axis = _SHARED_OUT.get(kernel)
    if axis is None:
        return chosen
    block = getattr(chosen, axis)
    programs = heads * -(-length // block)
    if block < 128 or programs >= 2 * _MULTIPROCESSORS.get(_generation(architecture), 108):
        return chosen
    return chosen._replace(**{axis: block // 2}, num_warps=chosen.num_warps // 2)
