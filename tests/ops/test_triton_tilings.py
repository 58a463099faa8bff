"""Triton's kernels with many small tiles a map, whose sums move from one origin to the next.

Elsewhere the interpreter's tiles are so large that most maps are one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.triton_problem import make_problem
from tests.conftest import HAS_GPU
from tests.ops.cases import (
    Inputs,
    Sizes,
    assert_as_accurate_as_eager,
    assert_equal,
    filled,
    name_of,
    random_cotangents,
    random_inputs,
)
from tests.ops.conftest import require_backend
from tests.ops.kinds import KINDS, Case, case_of
from tests.ops.layouts import amid

pytestmark = pytest.mark.skipif(HAS_GPU, reason="tilings of the interpreter")

SIZES = Sizes(B=1, H=2, Lq=20, Lk=70)

SetTiles = Callable[..., None]

# Every value of the parameters, not every combination (conftest.py).
covered = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    require_backend("triton")
    with np.errstate(all="ignore"):  # Triton's interpreter computes with numpy
        yield


@pytest.fixture
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> SetTiles:
    """Make the interpreter's tiles so many rows and keys large."""
    from attn_kd.kernels.triton import configurations

    def function(block_q: int = 16, block_k: int = 16, rescale_above: int = 0) -> None:
        tiling = configurations.Tiling(block_q, block_k, 4, 1, rescale_above)
        monkeypatch.setattr(configurations, "INTERPRETED", tiling)

    return function


def sharpened(case: Case) -> Case:
    """With logits that grow from tile to tile: by powers of two from below 1 to above 8."""
    key, teacher_key = case.inputs.key, case.inputs.teacher_key
    growing = torch.linspace(0.1, 6, key.shape[2])[:, None]
    group = teacher_key.shape[2] // key.shape[2]
    inputs = case.inputs._replace(
        key=key * growing, teacher_key=teacher_key * growing.repeat_interleave(group, 0)
    )
    return case._replace(inputs=inputs)


def check(case: Case) -> None:
    actual = case.seeded_step("triton")
    assert_as_accurate_as_eager(actual, case.inputs, case.cotangents, **case.explicit_options())


def check_options(**options) -> None:
    check(sharpened(Case(random_inputs(SIZES), random_cotangents(SIZES), options)))


def test_the_tiles_are_those_that_are_set(set_tiles):
    from attn_kd.ops.triton_launch import make_variant

    set_tiles(32, 16)
    problem = make_problem(Operands(*random_inputs(SIZES)), Options())
    variant, _ = make_variant("forward", problem, value_dim=SIZES.Dv)
    assert (variant.block_q.value, variant.block_k.value) == (32, 16)


@pytest.mark.parametrize("tile", [(16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_call(set_tiles, kind, tile):
    """With tiles that are not square, which tell their rows from their keys."""
    set_tiles(*tile)
    check(case_of(kind, SIZES))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("rescale_above", [0, 1, 8], ids=lambda n: f"rescaled above {n}")
def test_sums_that_are_rescaled_seldom_or_always(set_tiles, rescale_above, divergence):
    set_tiles(rescale_above=rescale_above)
    check_options(divergence=divergence)


@pytest.mark.parametrize("rescale_above", [0, 8], ids=lambda n: f"rescaled above {n}")
def test_rows_that_see_their_first_key_in_a_later_tile(set_tiles, rescale_above):
    set_tiles(rescale_above=rescale_above)
    mask = torch.rand(SIZES.Lq, SIZES.Lk) > 0.3
    mask[3, :40] = mask[4] = False
    check_options(attn_mask=mask)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
@pytest.mark.parametrize("rows", [1, SIZES.Lq], ids=["per key", "of pairs"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_every_tile_reads_its_own_part_of_a_mask(set_tiles, divergence, rows, additive):
    set_tiles()
    mask = torch.rand(1, 1, rows, SIZES.Lk) > 0.3
    if additive:
        mask = torch.where(mask, 3 * torch.randn(mask.shape), float("-inf"))
    check_options(attn_mask=mask, divergence=divergence)


@covered
@pytest.mark.parametrize(
    "hidden", [slice(16), slice(16, 48), slice(48, None)], ids=["first", "middle", "last"]
)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js", "averaged heads", "groups"])
@pytest.mark.parametrize("rows", [1, SIZES.Lq], ids=["per key", "of pairs"])
def test_tiles_of_which_no_key_is_visible(backend, set_tiles, kind, hidden, rows):
    """The first, some in the middle, the last: as if their keys were not there."""
    set_tiles()
    case = case_of(KINDS[kind], SIZES)
    mask = torch.ones(1, 1, rows, SIZES.Lk, dtype=torch.bool)
    mask[..., hidden] = False
    check(case._replace(options={**case.options, "attn_mask": mask}))


@covered
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("kind", ["reverse_kl", "averaged heads", "js"])
def test_nan_in_hidden_tiles_changes_nothing(backend, set_tiles, kind, dtype):
    """Bit for bit, in tiles that padding fills in part and those that it fills whole."""
    set_tiles()
    case = case_of(KINDS[kind], SIZES, dtype)
    visible = torch.arange(SIZES.Lk)[None, None, None] < 25
    case = case._replace(options={**case.options, "attn_mask": visible})
    clean, dirty = (
        case._replace(inputs=filled(case.inputs, ~visible, value)).step("triton")
        for value in (0.0, torch.nan)
    )
    assert_equal(dirty, clean)
    assert not any(result.isnan().any() for result in clean.values())


@covered
@pytest.mark.parametrize("width", [20, 32], ids=["narrower than a tile", "as wide as a tile"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_nothing_is_read_beyond_a_tensor(backend, set_tiles, kind, width):
    """Where tiles end behind the last row, key or column, there are NaN; behind a mask, keys."""
    set_tiles()
    case = case_of(kind, SIZES._replace(D=width, Dv=width, Dt=width))
    options = dict(case.options)
    if "attn_mask" in options:
        mask = options["attn_mask"]
        options["attn_mask"] = amid(True if mask.dtype == torch.bool else torch.nan, mask)
    amidst = case._replace(
        inputs=Inputs(*(amid(torch.nan, tensor) for tensor in case.inputs)),
        cotangents=case.cotangents._replace(output=amid(torch.nan, case.cotangents.output)),
        options=options,
    )
    assert_equal(amidst.seeded_step("triton"), case.seeded_step("triton"))
