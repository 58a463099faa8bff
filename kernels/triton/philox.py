"""The noise of dropout, that of attn_kd/ops/philox.py: a function of an entry's place alone."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Noise(NamedTuple):
    """What decides which entries of the map dropout keeps."""

    seed: Any  # [2] int64 on the device: seed and offset
    threshold: Any  # the lowest word that is kept, its bits as int32
    keep_factor: Any  # 1 / (1 - p)


@triton.jit
def kept_pairs(noise, head, first_row, first_key, V: tl.constexpr):
    """[block_q, block_k] bool; head is b * H + h, first_key a multiple of 4.

    Word `key % 4` of Philox4x32-10 of the counter (key // 4, query row, head, low word of the
    offset) with the seed as its key.
    """
    QUADS: tl.constexpr = V.block_k // 4
    rows, quads = tl.arange(0, V.block_q), tl.arange(0, QUADS)
    zeros = tl.zeros([V.block_q, QUADS], tl.uint32)
    seed, offset = tl.load(noise.seed), tl.load(noise.seed + 1)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        zeros + tl.cast(first_key // 4 + quads, tl.uint32)[None, :],
        zeros + tl.cast(first_row + rows, tl.uint32)[:, None],
        zeros + tl.cast(head, tl.uint32),
        zeros + tl.cast(offset, tl.uint32),
        10,
    )
    threshold = tl.cast(noise.threshold, tl.uint32)
    # Joined last to first axis, so that the four stand side by side: key = 4 * quad + word.
    even = tl.join(word_0 >= threshold, word_2 >= threshold)
    odd = tl.join(word_1 >= threshold, word_3 >= threshold)
    return tl.reshape(tl.join(even, odd), [V.block_q, V.block_k])
