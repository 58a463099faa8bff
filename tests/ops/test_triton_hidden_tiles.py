"""Tiles of keys that a key padding mask hides wholly: no Triton kernel computes them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from attn_kd.kernels.triton import configurations
from attn_kd.kernels.triton.operands import HeadMask
from attn_kd.kernels.triton.variant import Variant
from attn_kd.kernels.triton.visible_span import STRETCH, visible_span
from tests.conftest import HAS_GPU
from tests.ops.cases import (
    Sizes,
    assert_as_accurate_as_eager,
    assert_equal,
    filled,
    random_cotangents,
    random_inputs,
    run_backend,
)
from tests.ops.conftest import require_backend

BLOCK = 16
SIZES = Sizes(B=1, H=2, Lq=20, Lk=5 * BLOCK + 3)
SMALL_TILES = configurations.Tiling(BLOCK, BLOCK, 4, 1)
interpreted = pytest.mark.skipif(HAS_GPU, reason="tilings of the interpreter")


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    require_backend("triton")
    with torch.device("cuda" if HAS_GPU else "cpu"), np.errstate(all="ignore"):
        yield


def mask_of_tiles(shown: list[bool], key_length: int) -> Tensor:
    """[key_length] bool with one visible key in each of the tiles that are to be shown."""
    mask = torch.zeros(len(shown), BLOCK, dtype=torch.bool)
    last = min(BLOCK, key_length - (len(shown) - 1) * BLOCK)  # keys of the last tile
    for tile, is_shown in enumerate(shown):
        count = last if tile == len(shown) - 1 else BLOCK
        mask[tile, torch.randint(count, ()).item()] = is_shown
    return mask.flatten()[:key_length]


@triton.jit
def span_kernel(mask, column_stride, key_length, span, V: tl.constexpr):
    """Write the bounds of what is to be visited."""
    head = HeadMask(mask, 0, column_stride)
    begin, end = visible_span(head, 0, key_length, V)
    tl.store(span, begin)
    tl.store(span + 1, end)


TILES = 2 * STRETCH.value // BLOCK + 3  # more than are looked at together


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["bool", "additive"])
@pytest.mark.parametrize(
    "shown",
    [[], [0], [TILES - 1], [3, 4, 90], [64], [63, 64], list(range(TILES))],
    ids=lambda tiles: f"{len(tiles)} tiles from {min(tiles, default=0)}",
)
def test_the_span_is_from_the_first_visible_key_to_the_last(shown, dtype):
    key_length = TILES * BLOCK - 5
    mask = mask_of_tiles([tile in shown for tile in range(TILES)], key_length)
    every_third = torch.zeros(key_length, 3, dtype=dtype)
    every_third[:, 0] = mask if dtype == torch.uint8 else torch.where(mask, 0.0, -torch.inf)
    span = torch.empty(2, dtype=torch.int32)
    variant = Variant(BLOCK, BLOCK, BLOCK, masked=True, mask_per_key=True)
    span_kernel[(1,)](every_third, 3, key_length, span, variant)
    begin, end = span.tolist()
    if shown:
        assert begin == min(shown) * BLOCK and end == mask.nonzero().max() + 1
    else:
        assert begin >= end


PATTERNS = {
    "first tiles": [False, False, True, True, True, True],
    "last tiles": [True, True, True, True, False, False],
    "between": [True, False, False, True, False, True],
    "all": [False] * 6,
}


@interpreted
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize(
    ("divergence", "head_reduction"),
    [("reverse_kl", "none"), ("forward_kl", "none"), ("js", "none"), ("mse", "mean")],
    ids=str,
)
def test_the_results_are_bit_for_bit_those_of_computing_them(
    monkeypatch, pattern, divergence, head_reduction
):
    """A mask of pairs that says the same of every query is not looked at in advance."""
    monkeypatch.setattr(configurations, "INTERPRETED", SMALL_TILES)
    inputs = random_inputs(SIZES)
    cotangents = random_cotangents(SIZES, head_reduction=head_reduction)
    mask = mask_of_tiles(pattern, SIZES.Lk).expand(1, 1, SIZES.Lq, -1)
    options = {"divergence": divergence, "head_reduction": head_reduction}
    passed_over, computed = (
        run_backend("triton", inputs, cotangents, attn_mask=m, **options)
        for m in (mask, mask.contiguous())
    )
    assert_equal(passed_over, computed)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **named)


# kernel: the function of a tile or block, a call that launches it, calls without a mask
WORK = {
    "forward": ("forward.add_tile", {}),
    "backward_rows": ("backward.add_keys", {}),
    "backward_keys": ("backward.add_rows", {}),
    "two_pass_forward": ("two_pass_forward.add_tile", {"divergence": "js"}),
    "two_pass_backward": ("two_pass_backward.pair_gradients", {"divergence": "js"}),
    "group_slopes": ("group_maps.student_average", {"head_reduction": "mean"}),
}


@interpreted
@pytest.mark.parametrize(("function", "options"), WORK.values(), ids=WORK.keys())
def test_every_kernel_passes_them_over(monkeypatch, function, options):
    module, name = function.split(".")
    module = importlib.import_module(f"attn_kd.kernels.triton.{module}")
    counted = Counted(getattr(module, name))
    monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(configurations, "INTERPRETED", SMALL_TILES)
    inputs = random_inputs(SIZES)
    cotangents = random_cotangents(SIZES, head_reduction=options.get("head_reduction", "none"))
    counts = []
    for shown in ([True] * 6, [False, True, True, False, False, False]):
        counted.calls = 0
        mask = mask_of_tiles(shown, SIZES.Lk)
        run_backend("triton", inputs, cotangents, attn_mask=mask, **options)
        counts.append(counted.calls)
    assert counts[0] == 3 * counts[1] > 0


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_nothing_in_them_is_seen(divergence):
    sizes = SIZES._replace(B=2, Lk=700)
    hidden = torch.zeros(2, 1, 1, sizes.Lk, dtype=torch.bool)
    hidden[0, ..., 130:390] = hidden[1, ..., 250:] = True
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    options = {"attn_mask": ~hidden, "divergence": divergence}
    actual = run_backend("triton", filled(inputs, hidden, torch.nan), cotangents, **options)
    assert_as_accurate_as_eager(actual, filled(inputs, hidden, 0.0), cotangents, **options)
