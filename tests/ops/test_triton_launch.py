"""What the Triton kernels are launched with: tilings, strides, masks that are not expanded."""

from __future__ import annotations

import pytest
import torch

from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.triton_problem import in_reach, make_problem
from tests.ops.cases import Sizes, random_inputs
from tests.ops.conftest import require_backend

SIZES = Sizes(B=2, H=3, Lq=5, Lk=7)


@pytest.fixture(autouse=True)
def _on_triton() -> None:
    require_backend("triton")


def problem_with(attn_mask=None, **options):
    return make_problem(Operands(*random_inputs(SIZES), attn_mask=attn_mask), Options(**options))


@pytest.mark.parametrize("kernel", ["forward", "backward_rows", "backward_keys"])
@pytest.mark.parametrize("width", [32, 64])
def test_blocks_are_halved_where_they_would_not_fill_the_gpu(kernel, width):
    from attn_kd.kernels.triton.configurations import tiling

    many, few = (tiling(kernel, width, 2, 90, heads, length=1000) for heads in (1000, 8))
    assert max(many[:2]) == 128 and max(few[:2]) == 64
    assert many.num_warps == 2 * few.num_warps


@pytest.mark.parametrize("width", [1, 17, 33, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_kernel_has_a_tiling_for_every_width(width, itemsize):
    from attn_kd.kernels.triton.configurations import KERNELS, tiling

    for kernel in KERNELS:
        tile = tiling(kernel, width, itemsize, 80, heads=8, length=100)
        assert tile.block_q >= 16 and tile.block_k >= 16  # tl.dot takes no less


def test_equal_variants_share_a_compiled_kernel():
    from attn_kd.ops.triton_launch import make_variant

    first, second = (make_variant("forward", problem_with(), value_dim=5)[0] for _ in range(2))
    other, _ = make_variant("forward", problem_with(divergence="forward_kl"), value_dim=5)
    assert first == second and hash(first) == hash(second) and first != other


@pytest.mark.parametrize(
    ("shape", "zero"),
    [
        ((7,), (0, 0, 0, 1)),
        ((2, 1, 1, 7), (7, 0, 0, 1)),
        ((5, 7), (0, 0, 7, 1)),
        ((2, 3, 5, 1), (15, 5, 1, 0)),
    ],
    ids=str,
)
def test_masks_are_read_where_they_are(shape, zero):
    from attn_kd.ops.triton_launch import mask_of

    mask = torch.ones(shape, dtype=torch.bool)
    data, *strides = mask_of(problem_with(mask))
    assert data.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
    assert tuple(strides) == zero


@pytest.mark.parametrize("dropout_p", [0.0, 0.25, 0.5, 0.9, 1 - 2**-40], ids=str)
def test_the_threshold_of_dropout_fits_32_bits(dropout_p):
    from attn_kd.ops.triton_launch import noise_of

    operands = Operands(*random_inputs(SIZES), dropout_seed=torch.tensor([1, 2]))
    noise = noise_of(make_problem(operands, Options(dropout_p=dropout_p)))
    assert -(2**31) <= noise.threshold < 2**31
    assert noise.threshold % 2**32 == pytest.approx(dropout_p * 2**32, abs=1)


def test_rows_that_are_far_apart_are_copied():
    """Offsets within 256 of them would not fit 32 bits."""
    near = torch.empty(1, device="meta").as_strided((1, 1, 4, 8), (0, 0, 2**22, 1))
    far = torch.empty(1, device="meta").as_strided((1, 1, 4, 8), (0, 0, 2**23, 1))
    assert in_reach(near) is near and in_reach(far).is_contiguous()
    assert in_reach(near, group=2).is_contiguous()
