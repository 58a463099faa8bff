"""Calls of the Triton operators that between them launch every kernel, in every kind of tiling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attn_kd.kernels.triton import configurations
from attn_kd.kernels.triton.configurations import (
    KERNELS,
    PLAIN,
    WIDTHS,
    Extras,
    Tiling,
    tiling,
)
from attn_kd.ops import triton_operator
from bench.cubins import ARCHITECTURES

TOKENS = 1064
# Enough for large blocks, and too few: with so few rows, blocks are halved to busy a whole GPU.
HEADS, FEW_HEADS = 128, 8
TUNED_WIDTHS = (32, 64)
DTYPES = (torch.bfloat16, torch.float32)  # one of each kind that has its own tilings


@dataclass(frozen=True)
class KernelCall:
    """A forward pass and its backward, on tensors that take no memory."""

    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    teacher: bool = True
    teacher_lse: bool = True  # given, not computed
    value: bool = True  # without: the divergence alone
    divergence: str = "reverse_kl"
    head_reduction: str = "none"
    mask: str | None = None  # "keys": bool, of a key; "pairs": additive, of a query and a key
    dropout_p: float = 0.0
    heads: int = HEADS
    rescale_above: int | None = None  # of the forward pass, in the place of the tables' own

    @property
    def tuned(self) -> bool:
        """Whether the tilings are meant to be fast; these may not spill."""
        return self.head_dim in TUNED_WIDTHS and self.dtype.itemsize == 2

    @property
    def two_pass(self) -> bool:
        """Whether it takes the kernels of two passes, after the forward one."""
        return self.head_reduction == "mean" or self.divergence in ("js", "mse")

    def tilings(self, arch: int) -> set[tuple[str, int, int, Tiling]]:
        """The tilings of its kernels, with what they are found by: kernel, width, itemsize."""
        kernels = [
            kernel
            for kernel in KERNELS
            if kernel == "forward" or _is_of_two_passes(kernel) == self.two_pass
        ]
        if self.head_reduction == "none" and self.two_pass:
            kernels.remove("group_slopes")
        pairs, dropout = self.mask == "pairs", self.dropout_p > 0
        found = set()
        for kernel in kernels:
            extras = Extras(pairs, dropout, self.divergence == "js" and _is_of_two_passes(kernel))
            tile = tile_of(kernel, self.head_dim, self.dtype, arch, self.heads, extras)
            found.add((kernel, self.head_dim, self.dtype.itemsize, tile))
        return found

    def run(self) -> None:
        """Launch the kernels of both passes."""
        key = "forward", self.head_dim
        own = table_of(self.dtype)[key]
        above = own.rescale_above if self.rescale_above is None else self.rescale_above
        with entry_replaced(*key, self.dtype, own._replace(rescale_above=above)):
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


def table_of(dtype: torch.dtype) -> dict[tuple[str, int], Tiling]:
    """The tilings of operands of that dtype, by kernel and class of width."""
    return configurations._HALF if dtype.itemsize == 2 else configurations._FLOAT


@contextmanager
def entry_replaced(kernel: str, width: int, dtype: torch.dtype, tile: Tiling) -> Iterator[None]:
    """Within it, that entry of the tables is another; where Triton interprets, so are all."""
    with (
        mock.patch.dict(table_of(dtype), {(kernel, width): tile}),
        mock.patch.object(configurations, "INTERPRETED", tile),
    ):
        yield


def tile_of(
    kernel: str,
    width: int,
    dtype: torch.dtype,
    arch: int,
    heads: int,
    extras: Extras = PLAIN,
) -> Tiling:
    """The tiling of a kernel in a call with so many heads of that width."""
    return tiling(kernel, width, dtype.itemsize, arch, heads, TOKENS, extras)


def _is_of_two_passes(kernel: str) -> bool:
    return kernel.startswith(("two_pass", "group"))


# What a call may ask for besides, and kernels are compiled for.
FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "head mean": {"head_reduction": "mean"},
    "teacher's LSE computed": {"teacher_lse": False},
    "key padding": {"mask": "keys"},
    "key padding, dropout": {"mask": "keys", "dropout_p": 0.1},
    "mask of pairs": {"mask": "pairs"},
    "mask of pairs, dropout": {"mask": "pairs", "dropout_p": 0.1},
    "dropout": {"dropout_p": 0.1},
    "forward_kl": {"divergence": "forward_kl"},
    "attention": {"teacher": False},
    "divergence alone": {"value": False},
    "js": {"divergence": "js"},
    "js, mask of pairs, dropout": {"divergence": "js", "mask": "pairs", "dropout_p": 0.1},
    "mse": {"divergence": "mse"},
    "head mean, js": {"head_reduction": "mean", "divergence": "js"},
    "head mean, mask of pairs": {"head_reduction": "mean", "mask": "pairs"},
    "rescaled always": {"rescale_above": 0},
    "rescaled above 2^8": {"rescale_above": 8},
    "float16": {"dtype": torch.float16},
}


def _all_calls() -> dict[str, KernelCall]:
    """Every form of call in every width, with many and with few rows."""
    calls = {}
    for dtype, width, form, heads in product(DTYPES, WIDTHS, FORMS, (HEADS, FEW_HEADS)):
        head_dim = f"head_dim {width}" if dtype.itemsize == 2 else f"float32, head_dim {width}"
        name = ", ".join(filter(None, (head_dim, form, "few rows" * (heads == FEW_HEADS))))
        facts = {"head_dim": width, "dtype": dtype, "heads": heads}
        calls[name] = KernelCall(**facts | FORMS[form])
    return calls


def _with_new_tilings(calls: dict[str, KernelCall], arch: int) -> set[str]:
    """The calls that have a tiling which none before them has."""
    chosen, seen = set(), set()
    for name, call in calls.items():
        if call.tilings(arch) - seen:
            chosen.add(name)
            seen |= call.tilings(arch)
    return chosen


# By architecture: between them they have every tiling.
FOR_THE_TILINGS = {arch: _with_new_tilings(_all_calls(), arch) for arch in ARCHITECTURES}
# These, and of the tuned widths every form.
CALLS = {
    name: call
    for name, call in _all_calls().items()
    if (call.tuned and call.heads == HEADS)
    or any(name in names for names in FOR_THE_TILINGS.values())
}
