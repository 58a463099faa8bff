"""Averaged maps in the Triton kernels: region after region, in a scratch of bounded size."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from attn_kd.ops import triton_two_pass
from attn_kd.ops.triton_two_pass import REGION_ELEMENTS, Region, regions_of
from tests.ops.cases import (
    Sizes,
    assert_as_accurate_as_eager,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

UNIT = 128  # the largest block of any kernel, the interpreted ones' too

# batch entries, queries, keys
MAPS = {
    "paper": (8, 169, 169),
    "coco": (2, 1064, 1064),
    "dc5": (1, 4200, 4200),
    "video": (1, 16384, 16384),
    "cross": (8, 100, 1064),
    "one query": (3, 1, 5_000_000),
    "one key": (2, 3_000_001, 1),
    "many small ones": (8192, 16, 16),
    "many short ones": (512, 1, 1000),
}


@pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS.keys())
def test_regions_cover_every_pair_once(shape):
    batch, queries, keys = shape
    regions = regions_of(Region(0, batch, 0, queries, 0, keys), UNIT)
    assert sum(r.entries * r.queries * r.keys for r in regions) == batch * queries * keys
    assert len({(r.batch, r.query, r.key) for r in regions}) == len(regions)
    for region in regions:
        assert region.query % UNIT == region.key % UNIT == 0
        assert region.batch + region.entries <= batch
        assert region.query + region.queries <= queries
        assert region.key + region.keys <= keys


@pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS.keys())
def test_a_region_is_bounded_whatever_the_lengths(shape):
    """Rounding either side up to tiles adds less than a fourth to a square region."""
    batch, queries, keys = shape
    regions = regions_of(Region(0, batch, 0, queries, 0, keys), UNIT)
    scratch = triton_two_pass._scratch(regions, UNIT, torch.empty(0, device="meta"))
    assert scratch.numel() <= 1.25 * REGION_ELEMENTS
    for region in regions:
        tiles = [-(-size // UNIT) * UNIT for size in (region.queries, region.keys)]
        assert region.entries <= scratch.shape[0]
        assert tiles[0] <= scratch.shape[1] and tiles[1] <= scratch.shape[2]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("divergence", "dtype", "mask"),
    [
        ("reverse_kl", torch.bfloat16, None),
        ("forward_kl", torch.float32, "pairs"),
        ("js", torch.float32, "key padding"),
        ("mse", torch.float16, None),
    ],
    ids=name_of,
)
def test_several_regions(backend, monkeypatch, divergence, dtype, mask):
    """Of gradients in 16 bits too the regions' parts are summed in float32."""
    monkeypatch.setattr(triton_two_pass, "REGION_ELEMENTS", 40 * 40)
    sizes = Sizes(B=1, H=2, Lq=130, Lk=150, Ht=3)
    regions = regions_of(Region(0, sizes.B, 0, sizes.Lq, 0, sizes.Lk), UNIT)
    assert len(regions) == 2 * 2
    masks = {
        "pairs": torch.rand(sizes.Lq, sizes.Lk) > 0.4,
        "key padding": torch.rand(sizes.B, 1, 1, sizes.Lk) > 0.4,
    }
    options = {"divergence": divergence, "head_reduction": "mean", "attn_mask": masks.get(mask)}
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype, "mean")
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)
