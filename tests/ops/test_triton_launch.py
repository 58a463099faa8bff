"""What the Triton kernels are launched with: tilings, strides, masks that are not expanded."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kd.ops import fake, triton_two_pass
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.triton_problem import in_reach, make_problem
from tests.ops.cases import Sizes, random_inputs
from tests.ops.conftest import require_backend
from tests.ops.live_memory import LiveMemory

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


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
@pytest.mark.parametrize(
    "sizes",
    [(256, 4096, 64, 128), (1024, 1, 2**17, 128)],
    ids=["rows beside a large batch", "rows beside many heads"],
)
def test_tiles_are_within_reach_of_32_bits(monkeypatch, divergence, sizes):
    """Operands, results and gradients, where all are laid out as nn.MultiheadAttention does."""
    launches = launches_of(monkeypatch, sizes, divergence)
    assert len(launches) >= 4
    for launched in launches:
        for name, operand in operands_of(launched):
            assert operand.row_stride * 255 < 2**31, (launched.kernel.__name__, name)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
@pytest.mark.parametrize("sizes", [(40, 2, 3, 1), (1, 2, 3, 1), (1, 1, 1, 1)], ids=str)
def test_no_stride_is_1(monkeypatch, divergence, sizes):
    """Triton 3.6 compiles no loop over operands that have one."""
    expect_no_stride_of_1(launches_of(monkeypatch, sizes, divergence))


def test_no_stride_is_1_in_sums_over_regions(monkeypatch):
    """Nor is one in the float32 numbers that several regions of averaged maps add to."""
    monkeypatch.setattr(triton_two_pass, "REGION_ELEMENTS", 128 * 128)
    launches = launches_of(monkeypatch, (300, 2, 3, 1), "mse", head_reduction="mean")
    sums = [operand for one in launches for name, operand in operands_of(one) if "grad_" in name]
    assert any(operand.data.dtype == torch.float32 for operand in sums)
    expect_no_stride_of_1(launches)


def expect_no_stride_of_1(launches: list) -> None:
    assert len(launches) >= 4
    for launched in launches:
        for name, operand in operands_of(launched):
            assert 1 not in operand[1:], (launched.kernel.__name__, name)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=3)], ids=str)
def test_gradients_that_nobody_wants_take_no_memory(monkeypatch, divergence, wanted):
    """But that of a key takes that of its value and the reverse, and two passes a scratch."""
    sizes = (100, 2, 3, 16)
    x = without_data(sizes)
    of_query, of_key, of_value = wanted
    spared = x.nbytes * (not of_query and divergence != "js")
    spared += 2 * x.nbytes * (not of_key and not of_value)
    everything, some = (
        memory_of_backward(monkeypatch, sizes, divergence, mask) for mask in ((True,) * 3, wanted)
    )
    assert everything - some == spared


def memory_of_backward(
    monkeypatch, sizes: tuple[int, ...], divergence: str, wanted: tuple[bool, ...]
) -> int:
    """The most bytes that a backward pass has allocated at a time, its results among them."""
    backward, _ = backward_and_launches(monkeypatch, sizes, divergence)
    with LiveMemory() as memory:
        backward(output_mask=wanted)
    return memory.peak


def launches_of(monkeypatch, sizes: tuple[int, ...], divergence: str, **options: Any) -> list:
    """What a call and its backward pass launch."""
    backward, launches = backward_and_launches(monkeypatch, sizes, divergence, **options)
    backward()
    return launches


def backward_and_launches(
    monkeypatch, sizes: tuple[int, ...], divergence: str, **more: Any
) -> tuple[Callable[..., Any], list]:
    """The backward pass of a call without data, and a list of what is launched from then on."""
    from attn_kd.ops import triton_launch, triton_operator

    launches = []
    monkeypatch.setattr(triton_launch.Launch, "run", lambda launch: launches.append(launch))
    x, options = without_data(sizes), Options(divergence=divergence, **more)
    output, kl, _, teacher_lse, state = triton_operator.forward(*Operands(x, x, x, x, x), *options)
    saved = (x, x, x, x, x, None, None, output, teacher_lse, state)
    backward = functools.partial(triton_operator.backward, output, kl, None, *saved, *options)
    return backward, launches


def without_data(sizes: tuple[int, ...]) -> Tensor:
    """[B, H, L, D] as projections of [L, B, H * D] are split into heads."""
    return torch.empty(sizes, dtype=torch.bfloat16, device="meta").permute(1, 2, 0, 3)


def operands_of(launched) -> list:
    """The [B, H, L, width] operands of a launch by the names of arguments."""
    from attn_kd.kernels.triton.operands import Operand

    found = []
    for name, argument in launched.arguments.items():
        parts = argument if isinstance(argument, tuple) else ()
        parts = (argument,) if isinstance(argument, Operand) else parts
        found += [(name, x) for x in parts if isinstance(x, Operand) and x.data is not None]
    return found


@pytest.fixture
def matmul() -> Iterator[Any]:
    """torch.backends.cuda.matmul, whose fp32_precision a test may change."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_products_of_float32_are_as_exact_as_those_of_matmul(matmul):
    """Also where that changes between two calls of a kind."""
    from attn_kd.ops.triton_launch import make_variant

    problem = problem_with()
    for setting in ("ieee", "tf32", "ieee"):
        matmul.fp32_precision = setting
        variant, _ = make_variant("forward", problem, value_dim=problem.facts.value_dim)
        assert variant.precision.value == setting


def test_calls_of_a_kind_share_what_is_known_of_them():
    assert problem_with().facts is problem_with().facts


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x._replace(value=x.value[..., :4]),
        lambda x: x._replace(query=x.query.transpose(1, 2).contiguous().transpose(1, 2)),
        lambda x: x._replace(
            teacher_query=x.teacher_query.half(), teacher_key=x.teacher_key.half()
        ),
        lambda x: x._replace(teacher_lse=torch.zeros(x.query.shape[:3])),
        lambda x: x._replace(attn_mask=torch.ones(7)),
    ],
    ids=["width", "strides", "dtype", "another tensor", "mask"],
)
def test_calls_of_other_layouts_do_not(change):
    operands = Operands(*random_inputs(SIZES))
    facts, other = (make_problem(x, Options()).facts for x in (operands, change(operands)))
    assert facts is not other


@pytest.mark.parametrize("options", [Options(), Options(head_reduction="mean")], ids=["", "mean"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x._replace(teacher_lse=torch.zeros(x.query.shape[:3])),
        lambda x: Operands(*x[:3]),
        lambda x: x._replace(value=x.value[..., :0]),
    ],
    ids=["computes teacher_lse", "given teacher_lse", "without a teacher", "without a value"],
)
def test_results_are_what_tracing_says(options, change):
    operands = change(Operands(*random_inputs(SIZES, torch.bfloat16)))
    traced = fake.attention_kl_forward(*operands, *options)
    layouts = [(result.shape, result.stride(), result.dtype) for result in traced]
    assert [*make_problem(operands, options).facts.results] == layouts


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
        ("teacher_key", torch.Tensor.half),
        ("teacher_lse", torch.Tensor.double),
        ("teacher_lse", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ("dropout_seed", lambda x: torch.stack([x, x], dim=1)[:, 0]),
    ],
    ids=["columns apart", "teacher of two dtypes", "wide lse", "strided lse", "strided seed"],
)
def test_what_kernels_cannot_read_is_copied(name, change):
    lse, seed = torch.zeros(SIZES.B, SIZES.H, SIZES.Lq), torch.tensor([1, 2])
    operands = Operands(*random_inputs(SIZES), teacher_lse=lse, dropout_seed=seed)
    changed = operands._replace(**{name: change(getattr(operands, name))})
    there = make_problem(changed, Options()).operands
    for expected, given, tensor in zip(operands, changed, there, strict=True):
        if expected is not None:
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-3)
            assert tensor.stride(-1) == 1
            assert (tensor is given) == (given is expected)


def test_operands_that_kernels_can_read_are_left_where_they_are():
    """Heads after the length, as projections make them; a mask that is expanded."""
    mask = torch.ones(SIZES.B, 1, 1, SIZES.Lk, dtype=torch.bool).expand(-1, SIZES.H, SIZES.Lq, -1)
    inputs = random_inputs(SIZES)
    query = inputs.query.transpose(1, 2).contiguous().transpose(1, 2)
    operands = Operands(query, *inputs[1:], attn_mask=mask)
    for given, tensor in zip(operands, make_problem(operands, Options()).operands, strict=True):
        assert tensor is given


@pytest.mark.parametrize("heads", [8, 1000], ids=lambda n: f"{n} heads")
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_warp_has_rows_of_its_own(arch, width, heads):
    """Sixteen, the fewest that tensor cores multiply; more warps would repeat each other's."""
    from attn_kd.kernels.triton.configurations import KERNELS, tiling

    for kernel in KERNELS:
        tile = tiling(kernel, width, 2, arch, heads, length=1000)
        rows = tile.block_k if kernel.endswith("keys") else tile.block_q
        assert 16 * tile.num_warps <= rows, kernel
