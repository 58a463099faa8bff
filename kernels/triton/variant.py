"""What a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, fields

import triton
import triton.language as tl

# tl.dot takes no fewer columns.
_LEAST_WIDTH = 16


@dataclass(frozen=True)
class Variant:
    """The compile-time facts of a call, one argument of every kernel.

    Fields read as `tl.constexpr` (on the host, `.value` is the number); equal variants share a
    compiled kernel.
    """

    block_q: int
    block_k: int
    head_dim: int  # D
    value_dim: int = 0  # Dv; 0: no output, or no gradient of it
    teacher_dim: int = 0  # Dt; 0: no teacher
    divergence: str = "none"
    group: int = 1  # G, the teacher's keys to each of the student's
    teacher_lse_given: bool = False
    masked: bool = False
    mask_per_key: bool = False  # the mask has no query dimension
    dropout: bool = False
    precision: str = "ieee"  # of products of float32: "ieee" or "tf32"
    rescale_above: int = 0  # see configurations.py
    last_apart: bool = False  # likewise
    interpreted: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tl.constexpr(getattr(value, "value", value)))
        # Kept, since Triton asks for it at every launch.
        values = tuple(getattr(self, field.name).value for field in fields(self))
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        return self._hash

    @property
    def teacher_probability(self) -> tl.constexpr:
        """Whether the divergence's terms weigh by it, which costs an exponential a pair."""
        return tl.constexpr(self.divergence.value == "forward_kl")

    @property
    def whole_tiles(self) -> tl.constexpr:
        """Whether tiles of which all keys exist go without a mask, and the last one is apart."""
        return tl.constexpr(self.last_apart.value and not self.masked.value)

    @property
    def head_block(self) -> tl.constexpr:
        return _block(self.head_dim)

    @property
    def value_block(self) -> tl.constexpr:
        return _block(self.value_dim)

    @property
    def teacher_block(self) -> tl.constexpr:
        return _block(self.teacher_dim)


def _block(width: tl.constexpr) -> tl.constexpr:
    """The columns of a tile that holds `width` of them."""
    return tl.constexpr(max(_LEAST_WIDTH, triton.next_power_of_2(width.value)))
