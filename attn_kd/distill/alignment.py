"""Teacher and student on different token grids (Rubin et al. 2021, open problem 1), map-free.

Tokens lie row by row on a grid: (h, w), or (T, h, w) for a clip. Let t = scale · Q Kᵀ be the
teacher's logits on its own grid of n tokens, and m the number of the student's tokens. Both
alignments lead to teacher logits of the size of the student's map without writing either map down:
they change the factors Q and K, never t.

**resample.** Query and key maps are interpolated as images are. With R [m, n] the matrix of the
interpolation (rows sum to 1) the factors become R Q and R K, and as logits are bilinear in them,

    t′ = scale · (R Q) (R K)ᵀ = R t Rᵀ

The student learns from interpolated *logits*, for any two grids. Attention is not conserved: a peak
between the student's tokens is flattened, and a softmax over fewer tokens is another one. Padding
of the teacher has no part: with v [n] 1 where a token is visible and 0 where it is padding, the
rows of R are renormalised over what is visible (a normalised convolution),

    R′ = diag(R v)⁻¹ R diag(v)        that is, resample(x · v) / resample(v)

which is R, bit for bit, in every row that no padding lies in the reach of.

**group.** Student token j stands for the G teacher tokens g of the block it covers. With P [m, n]
the mean over blocks the teacher's queries become P Q, whose logits P t are the means of those of a
block's queries (their softmax is the normalised geometric mean of the queries' maps). Keys stay
apart; the operator compares the student's attention to j with the teacher's *mass* on j:

    t′_ij = log Σ_{g in j} exp (P t)_ig        softmax(t′_i)_j = Σ_{g in j} softmax((P t)_i)_g

so all that the teacher attends to in what the student sees counts. The student's grid must divide
the teacher's; a clip's time axis is grouped whole: (T, h, w) against (h′, w′) gives
G = T · h/h′ · w/w′.

Either way the student's mask says which of its tokens are padding, for both models. At the border
of the picture a student token may cover teacher tokens of which some are padding. If the record
knows the teacher's padding, those are left out: by "resample" of the filter, by "group" of sums and
means. (Its keys get one more feature, a bias of -2¹⁴, and queries a 1 beside it.) A student token
that covers nothing but padding is itself padding where images are padded at the right and at the
bottom, and the student hides it; if it does not, "group" counts all of the block, and "resample"
gives it factors of zero. With a record that knows no mask everything counts. A teacher without a
mask has no padding, whatever its pictures show. Biases of additive masks other than those that hide
are not carried over.
The teacher's log-sum-exp does not fit the new logits: the operator computes it anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.nn.masks import only_row, visible
from attn_kd.nn.taps import AttentionRecord

ALIGNMENTS = ("none", "resample", "group")

Grid = tuple[int, ...]  # (h, w), or (T, h, w)

# Of feature maps and patch embeddings; DINOv2's patches are 14 pixels wide.
_STRIDES = (1, 2, 4, 8, 14, 16, 32, 64)

# Exact in every dtype; its logit, -2896 at a head_dim of 32, leaves no mass in float32.
_BIAS = 2.0**14


def deduced_grid(tokens: int, image_size: tuple[int, int] | None) -> Grid | None:
    """Return the grid (h, w) of so many tokens of an image (height, width), if it is clear.

    It is clear where one stride, a power of two or 14, with sizes rounded up (convolutions with
    padding) or down (patches), gives that many tokens, and no other gives another grid of as many.
    Feature maps in the place of an image have stride 1. With class tokens nothing fits: None.
    """
    if image_size is None:
        return None
    height, width = image_size
    grids = {
        grid
        for s in _STRIDES
        for grid in ((-(-height // s), -(-width // s)), (height // s, width // s))
        if math.prod(grid) == tokens
    }
    return grids.pop() if len(grids) == 1 else None


def check_grid(name: str, grid: Sequence[int] | None) -> Grid | None:
    """Return a grid given by a user as a tuple.

    Raises:
        InputError: it is not two or three positive whole numbers.
    """
    if grid is None:
        return None
    values = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(values) not in (2, 3) or any(type(n) is not int or n < 1 for n in values):
        raise InputError(f"{name}={grid!r}; expected (h, w) or (T, h, w) in tokens")
    return values


def resample_tokens(
    tokens: Tensor,  # [B, H, h * w, D]
    grid: Grid,  # (h, w)
    target: Grid,  # (h', w')
    shown: Tensor | None = None,  # bool [B or 1, H or 1, h * w, 1]; None: every token
) -> Tensor:
    """Return tokens [B, H, h'·w', D] interpolated as an image: bilinear, antialiased.

    The antialiasing widens the filter where the target is coarser, so that every token counts. Of
    tokens that are not shown nothing counts, not even NaN; where none is in reach the result is 0.
    Computed in float32 at least; float64 stays.

    Raises:
        InputError: a grid has a time axis.
    """
    if len(grid) != 2 or len(target) != 2:
        raise InputError(
            f'alignment="resample" has no time axis: the grids are {grid} and {target}; '
            'expected (h, w), or alignment="group"'
        )
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if shown is None:
        return _interpolated(wide, grid, target)
    resized = _interpolated(wide.masked_fill(~shown, 0.0), grid, target)
    # Beside the mask a constant: the sums of the weights, 1 but for rounding. Their quotient is
    # exactly 1 where nothing hidden is in reach.
    shares = _interpolated(torch.cat([shown, torch.ones_like(shown)], -1).to(wide), grid, target)
    weight = shares[..., :1] / shares[..., 1:]
    return resized / weight.masked_fill(weight == 0, 1.0)


def _interpolated(
    tokens: Tensor,  # [B, H, h * w, D], float32 or float64
    grid: Grid,
    target: Grid,
) -> Tensor:
    """Return tokens [B, H, h'·w', D], all of them counted."""
    batch, heads, _, dim = tokens.shape
    image = tokens.transpose(2, 3).reshape(batch, heads * dim, *grid)
    resized = F.interpolate(image, size=target, mode="bilinear", antialias=True)
    return resized.reshape(batch, heads, dim, math.prod(target)).transpose(2, 3).contiguous()


def group_tokens(
    tokens: Tensor,  # [B, H, n, D]
    grid: Grid,  # n tokens
    target: Grid,  # m tokens
) -> Tensor:
    """Return tokens [B, H, m, G, D]: those in the block of each of the target's tokens.

    Raises:
        InputError: the target does not divide the grid.
    """
    coarse = (1,) * (len(grid) - len(target)) + target
    if len(coarse) != len(grid) or any(n % m for n, m in zip(grid, coarse, strict=True)):
        raise InputError(
            f"the teacher's grid is {grid}, the student's {target}: expected one that divides the "
            'teacher\'s along every axis, or alignment="resample"'
        )
    batch, heads, _, dim = tokens.shape
    blocks = [(m, n // m) for n, m in zip(grid, coarse, strict=True)]
    split = tokens.reshape(batch, heads, *(size for block in blocks for size in block), dim)
    axes = range(2, 2 + 2 * len(grid))
    split = split.permute(0, 1, *axes[::2], *axes[1::2], -1)
    return split.reshape(batch, heads, math.prod(target), -1, dim)


def resampled_record(
    record: AttentionRecord, grid: Grid, target: Grid, *, queries_are_tokens: bool
) -> AttentionRecord:
    """Return a teacher's record on the target's grid, by "resample" (see the module).

    `queries_are_tokens`: in self-attention the queries are interpolated too; in cross-attention
    they are object queries and stay.
    """
    shown = None
    if record.mask_known and record.attn_mask is not None:
        shown = _seen_tokens(record.attn_mask, grid)
    query = record.query
    if queries_are_tokens:
        query = resample_tokens(query, grid, target, shown)
    key = resample_tokens(record.key, grid, target, shown)
    return AttentionRecord(query, key, None, record.scale)


def grouped_record(
    record: AttentionRecord, grid: Grid, target: Grid, *, queries_are_tokens: bool
) -> AttentionRecord:
    """Return a teacher's record for the target's grid, by "group" (see the module).

    The key has G tokens, one after another, for each of the target's: [B, Ht, m·G, Dt]. In
    self-attention the queries are means over blocks, [B, Ht, m, Dt] in float32 at least. With a
    teacher that has padding, both have Dt + 1 features.

    Raises:
        InputError: the grid does not divide, or the teacher's mask depends on the query.
    """
    counts = None
    if record.mask_known and record.attn_mask is not None:
        counts = _counting_tokens(record.attn_mask, grid, target)  # [B or 1, Ht or 1, m, G, 1]
    query = record.query
    if queries_are_tokens:
        wide = torch.promote_types(query.dtype, torch.float32)
        query = group_tokens(query.to(wide), grid, target)
        query = query.mean(dim=3) if counts is None else _mean(query, counts)
    key = group_tokens(record.key, grid, target)
    scale = record.scale
    if counts is not None:
        scale = key.shape[-1] ** -0.5 if scale is None else scale
        bias = torch.zeros_like(key[..., :1]).masked_fill(~counts, math.copysign(_BIAS, -scale))
        key = torch.cat([key, bias], dim=-1)
        query = F.pad(query, (0, 1), value=1.0)
    return AttentionRecord(query, key.flatten(2, 3), None, scale, group=key.shape[3])


def _seen_tokens(attn_mask: Tensor, grid: Grid) -> Tensor:
    """Return which tokens some query sees, so that they are no padding: bool, [B|1, Ht|1, n, 1]."""
    row = only_row(attn_mask)
    shown = visible(attn_mask if row is None else row)
    shown = shown.reshape((1,) * (4 - shown.dim()) + shown.shape).any(dim=2)
    return shown.unsqueeze(-1).expand(-1, -1, math.prod(grid), -1)


def _counting_tokens(attn_mask: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Return which tokens of each block count: bool, [B or 1, Ht or 1, m, G, 1].

    Those that the teacher sees; all of a block of which it sees none.
    """
    if only_row(attn_mask) is None:
        raise InputError(
            f"the teacher's mask of shape {tuple(attn_mask.shape)} has a row for every query; "
            'alignment="group" expected one for all, [B, 1, 1, Lk], as for padding'
        )
    blocks = group_tokens(_seen_tokens(attn_mask, grid), grid, target)
    return blocks | ~blocks.any(dim=3, keepdim=True)


def _mean(tokens: Tensor, counts: Tensor) -> Tensor:
    """Return the means [B, H, m, D] of those tokens [B, H, m, G, D] that count."""
    return tokens.masked_fill(~counts, 0.0).sum(dim=3) / counts.sum(dim=3)
