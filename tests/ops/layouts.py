"""Ways in which a [B, H, L, D] tensor can lie in memory, all with the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def heads_after_length(x: Tensor) -> Tensor:
    """A view of [B, L, H, D], as a projection followed by a split into heads leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """One of three in a [B, L, 3, H, D] projection: an offset, and gaps between the rows."""
    whole = torch.full(
        (x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), torch.nan, dtype=x.dtype
    )
    whole[:, :, 1] = x.transpose(1, 2)
    return whole[:, :, 1].transpose(1, 2)


def odd_offset(x: Tensor) -> Tensor:
    """Columns 1 to D of wider rows: unit stride, aligned to nothing."""
    wide = torch.full((*x.shape[:3], x.shape[3] + 2), torch.nan, dtype=x.dtype)
    wide[..., 1:-1] = x
    return wide[..., 1:-1]


def every_other_column(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def columns_first(x: Tensor) -> Tensor:
    """A view of [B, H, D, L]."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def reversed_dims(x: Tensor) -> Tensor:
    """A view of [D, L, H, B]."""
    return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


LAYOUTS = (
    contiguous,
    heads_after_length,
    packed,
    odd_offset,
    every_other_column,
    columns_first,
    reversed_dims,
)


def far_apart(x: Tensor, dim: int, path: Path) -> Tensor:
    """The same values with a stride along one dimension by which the last is 2^31 elements away.

    They are mapped from a file at `path` that is nearly all holes; a GPU has no such thing, and
    needs the memory.
    """
    if x.shape[dim] == 1:
        return x
    stride = -(-(2**31) // (x.shape[dim] - 1) // 8) * 8
    strides = [*x.contiguous().stride()]
    strides[dim] = stride
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    if x.is_cuda:
        memory = _memory_of_a_gpu(extent, x)
    else:
        memory = torch.from_file(str(path), shared=True, size=extent, dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


def _memory_of_a_gpu(extent: int, like: Tensor) -> Tensor:
    try:
        return torch.empty(extent, dtype=like.dtype, device=like.device)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"needs {extent * like.itemsize / 2**30:.0f} GiB more of the GPU's memory")


def amid(filling: float, x: Tensor, rows: int = 64, columns: int = 16) -> Tensor:
    """The same values, with others before and behind the rows and the columns of every head."""
    B, H, L, D = x.shape
    memory = x.new_full((B, H, L + 2 * rows, D + 2 * columns), filling)
    inner = memory[:, :, rows:-rows, columns:-columns]
    inner.copy_(x)
    return inner
