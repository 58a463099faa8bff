"""Calls of the Triton operators that between them launch every kernel, in every kind of tiling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kd.kernels.triton import configurations
from attn_kd.ops import triton_operator

TOKENS = 1064
# Enough for large blocks, and too few: with so few rows, blocks are halved to busy a whole GPU.
HEADS, FEW_HEADS = 128, 8


@dataclass(frozen=True)
class KernelCall:
    """A forward pass and its backward, on tensors that take no memory.

    Attributes:
        tuned: the tilings are meant to be fast, and may not spill.
        everywhere: the tests compile it for every architecture, not for one alone.
        rescale_above: of the forward pass's tilings, in the place of the tables' own.
    """

    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    teacher: bool = True
    teacher_lse: bool = True  # given, not computed
    value: bool = True  # without: the divergence alone
    divergence: str = "reverse_kl"
    head_reduction: str = "none"
    mask: str | None = None  # "keys": bool, of a key; "pairs": additive, of a query and a key
    dropout_p: float = 0.0
    tuned: bool = False
    everywhere: bool = False
    heads: int = HEADS
    rescale_above: int | None = None

    def run(self) -> None:
        """Launch the kernels of both passes."""
        with _rescaling(self.rescale_above):
            self._run()

    def _run(self) -> None:
        query, key, teacher_query, teacher_key = (self._rows(self.head_dim) for _ in range(4))
        value = self._rows(self.head_dim if self.value else 0)
        lse = torch.empty(1, self.heads, TOKENS, device="meta")
        teacher = (teacher_query, teacher_key) if self.teacher else (None, None)
        given = lse if self.teacher and self.teacher_lse else None
        mask, seed = self._mask(), torch.empty(2, dtype=torch.int64, device="meta")
        seed = seed if self.dropout_p > 0 else None
        options = (None, None, self.divergence, self.head_reduction, self.dropout_p)
        output, kl, _, own_lse, state = triton_operator.forward(
            query, key, value, *teacher, given, mask, seed, *options
        )
        known_lse = (own_lse if given is None else given) if self.teacher else None
        triton_operator.backward(
            torch.empty_like(output) if self.value else None,
            kl if self.teacher else None,
            None,
            *(query, key, value, *teacher, mask, seed, output, known_lse, state),
            *options,
        )

    def _rows(self, width: int) -> Tensor:
        return torch.empty(1, self.heads, TOKENS, width, dtype=self.dtype, device="meta")

    def _mask(self) -> Tensor | None:
        if self.mask == "keys":
            return torch.empty(1, 1, 1, TOKENS, dtype=torch.bool, device="meta")
        if self.mask == "pairs":
            return torch.empty(1, 1, TOKENS, TOKENS, dtype=self.dtype, device="meta")
        return None


@contextmanager
def _rescaling(rescale_above: int | None) -> Iterator[None]:
    table = configurations._HALF
    before = dict(table)
    if rescale_above is not None:
        table.update({key: t._replace(rescale_above=rescale_above) for key, t in before.items()})
    try:
        yield
    finally:
        table.update(before)


FLOAT = torch.float32
CALLS = {
    "head_dim 32": KernelCall(tuned=True, everywhere=True),
    "head_dim 64": KernelCall(64, tuned=True, everywhere=True),
    "head_dim 32, few rows": KernelCall(tuned=True, heads=FEW_HEADS),
    "head_dim 64, few rows": KernelCall(64, tuned=True, heads=FEW_HEADS),
    "rescaled above 2^8": KernelCall(rescale_above=8),
    "head_dim 64, rescaled above 2^8": KernelCall(64, rescale_above=8),
    "teacher's LSE computed": KernelCall(teacher_lse=False, tuned=True),
    "key padding": KernelCall(mask="keys", tuned=True),
    "mask of pairs, dropout": KernelCall(mask="pairs", dropout_p=0.1),
    "forward_kl": KernelCall(divergence="forward_kl", tuned=True),
    "attention": KernelCall(teacher=False),  # on sm_100 the rows' gradients spill 16 bytes
    "divergence alone": KernelCall(value=False, tuned=True),
    "js": KernelCall(divergence="js", tuned=True),
    "mse": KernelCall(divergence="mse", tuned=True),
    "head mean": KernelCall(head_reduction="mean", tuned=True),
    "head mean, js": KernelCall(head_reduction="mean", divergence="js"),
    "head_dim 128": KernelCall(128),
    "head_dim 256": KernelCall(256),
    "float32": KernelCall(dtype=FLOAT),
    "float32, head_dim 64": KernelCall(64, FLOAT),
    "float32, head_dim 256": KernelCall(256, FLOAT),
    "float32, head mean": KernelCall(dtype=FLOAT, head_reduction="mean"),
}
