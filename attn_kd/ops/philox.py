"""The noise of dropout: Philox4x32-10, a counter-based generator, in plain torch.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A pair's random
word is a function of the call's seed and of the pair's place in the attention map alone, so that
forward and backward, every backend, tiling, number of threads and instruction set see the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_seed(device: torch.device) -> Tensor:
    """Draw [2] int64, seed and offset, from the device's default generator."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def keep_mask(
    dropout_seed: Tensor,  # [2] int64
    dropout_p: float,
    shape: tuple[int, ...],  # B, H, query rows, Lk
    first_row: int = 0,
) -> Tensor:
    """Return bool [B, H, rows, Lk] of query rows from first_row on: what dropout keeps.

    The counter is (key index // 4, query row, b * H + h, low word of the offset), the key is the
    seed, and word (key index % 4) keeps the pair if it is at least dropout_p * 2**32.
    """
    batch, heads, rows, keys = shape
    seed, offset = dropout_seed.unbind()

    def indices(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count, device=dropout_seed.device)

    counter = (
        indices(0, (keys + 3) // 4),
        indices(first_row, rows)[:, None],
        indices(0, batch * heads).view(batch, heads, 1, 1),
        offset & _WORD,
    )
    words = torch.broadcast_tensors(*philox(counter, (seed & _WORD, (seed >> 32) & _WORD)))
    least = min(math.ceil(dropout_p * 2**32), _WORD)
    kept = torch.stack(words, dim=-1) >= least
    return kept.flatten(-2)[..., :keys]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Return four random words for a counter of four and a key of two, all int64 of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap around; that leaves both halves of the 64 bits right.
        low, high = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((high >> 32) & _WORD) ^ c1 ^ k0,
            high & _WORD,
            ((low >> 32) & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
