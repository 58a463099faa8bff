"""Which keys a kernel has to visit where padding hides some.

Sweeps over the keys begin with the first tile that a mask per key shows and end with the last, and
the programs of a block of keys that is hidden have no rows to visit. Hidden tiles in between are
computed; their probabilities are 0. To pass them over too takes a branch in the loop, under which
Triton does not fetch ahead, or a loop over the runs of visible tiles around it: as compiled for
head_dim 32 that loop took 25 to 50 registers of the forward pass and the gradient of queries, and
with them half of their resident warps on sm_90.
"""

import triton
import triton.language as tl

from attn_kd.kernels.triton.tiles import read_mask

# Keys that are looked at together.
STRETCH = tl.constexpr(1024)


@triton.jit
def visible_span(mask, first_key, end, V: tl.constexpr):
    """From the tile of the first visible key in [first_key, end) to behind the last; all of it
    where the mask, a head's, is not one per key. first_key is a multiple of block_k."""
    begin, behind = tl.cast(first_key, tl.int32), tl.cast(end, tl.int32)
    if V.mask_per_key:
        begin, behind = behind, begin
        for start in tl.range(first_key, end, STRETCH, num_stages=1):
            key = start + tl.arange(0, STRETCH)
            at = mask.data + tl.cast(key, tl.int64) * mask.column_stride
            visible, _ = read_mask(at, key < end)
            begin = tl.minimum(begin, tl.min(tl.where(visible, key, end)))
            behind = tl.maximum(behind, tl.max(tl.where(visible, key + 1, first_key)))
        begin = begin // V.block_k * V.block_k
    return tl.multiple_of(begin, V.block_k), behind


@triton.jit
def none_if_hidden(count, visible):
    """`count`, or 0 where nothing is visible."""
    return count * tl.max(visible.to(tl.int32))
