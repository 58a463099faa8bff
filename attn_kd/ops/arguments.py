"""What a call of the operators is made of, in the order of their schemas (csrc/library.cpp)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of a call; without a teacher it is plain attention."""

    query: Tensor  # [B, H, Lq, D]
    key: Tensor  # [B, H, Lk, D]
    value: Tensor  # [B, H, Lk, Dv]; Dv is 0 where the divergence alone is wanted
    teacher_query: Tensor | None = None  # [B, Ht, Lq, Dt]
    teacher_key: Tensor | None = None  # [B, Ht, G * Lk, Dt]
    teacher_lse: Tensor | None = None  # [B, Ht, Lq]
    attn_mask: Tensor | None = None  # broadcastable to [B, H, Lq, Lk]
    dropout_seed: Tensor | None = None  # [2] int64: seed, offset; there if dropout_p > 0


class Options(NamedTuple):
    """The other arguments of a call."""

    scale: float | None = None  # None: D ** -0.5
    teacher_scale: float | None = None  # None: Dt ** -0.5
    divergence: str = "reverse_kl"
    head_reduction: str = "none"
    dropout_p: float = 0.0
