"""The CUDA C++ kernels on a GPU: what their emulation on a CPU cannot show."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import attn_kd
from attn_kd.ops.arguments import Operands, Options
from tests.ops.cases import (
    Cotangents,
    Inputs,
    Results,
    Sizes,
    assert_as_accurate_as_eager,
    assert_equal,
    name_of,
    random_cotangents,
    random_inputs,
    run,
)
from tests.ops.conftest import require_backend

pytestmark = pytest.mark.gpu

call = partial(attn_kd.attention_kl, backend="cuda")
every_head_dim = pytest.mark.parametrize("head_dim", [32, 64])
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    require_backend("cuda")


def case(
    head_dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    lengths: tuple[int, int] = (67, 131),
    heads: int = 3,
) -> tuple[Inputs, Cotangents]:
    """On the CPU, where the truth is computed."""
    sizes = Sizes(B=2, H=heads, Lq=lengths[0], Lk=lengths[1], D=head_dim, Dv=head_dim, Dt=head_dim)
    return random_inputs(sizes, dtype), random_cotangents(sizes, dtype)


def on(device: str, inputs: Inputs, cotangents: Cotangents) -> tuple[Inputs, Cotangents]:
    there = Inputs(*(tensor.to(device) for tensor in inputs))
    return there, Cotangents(*(tensor.to(device) for tensor in cotangents))


def run_on(device: str, inputs: Inputs, cotangents: Cotangents, **options) -> Results:
    """Results and gradients, on the CPU again."""
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"].to(device)
    results = run(call, *on(device, inputs, cotangents), **options)
    return {name: result.cpu() for name, result in results.items()}


# The last two have enough blocks for those of 64 rows at head_dim 32.
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [((1, 1), 3), ((16, 64), 3), ((17, 63), 3), ((169, 169), 3), ((67, 131), 300), ((64, 64), 300)],
)
@every_dtype
@every_head_dim
def test_values_and_gradients(head_dim, dtype, lengths, heads):
    inputs, cotangents = case(head_dim, dtype, lengths, heads)
    assert_as_accurate_as_eager(run_on("cuda", inputs, cotangents), inputs, cotangents)


@pytest.mark.parametrize("kind", ["padding", "additive", "hidden entry"])
@every_dtype
@every_head_dim
def test_key_masks(head_dim, dtype, kind):
    inputs, cotangents = case(head_dim, dtype)
    mask = (torch.arange(131) < 90).expand(2, 1, 1, 131).clone()
    if kind == "hidden entry":
        mask[1] = False
    if kind == "additive":
        mask = torch.randn(2, 1, 1, 131).masked_fill(~mask, -torch.inf)
    actual = run_on("cuda", inputs, cotangents, attn_mask=mask)
    assert_as_accurate_as_eager(actual, inputs, cotangents, attn_mask=mask)


def test_two_backward_passes_are_bit_equal():
    inputs, cotangents = case(lengths=(200, 300), heads=40)
    first, second = (run_on("cuda", inputs, cotangents) for _ in range(2))
    assert_equal(second, first)


def test_a_side_stream_is_the_one_used():
    inputs, cotangents = on("cuda", *case())
    expected = run(call, inputs, cotangents)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # kernels of another stream would not wait for the doubling
        doubled = inputs._replace(query=inputs.query * 2)
        actual = run(call, doubled._replace(query=doubled.query / 2), cotangents)
    side.synchronize()
    assert_equal(actual, expected)


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, cotangents = case()
    assert_equal(run_on("cuda:1", inputs, cotangents), run_on("cuda:0", inputs, cotangents))


def test_a_training_step_is_captured_and_replayed():
    inputs, cotangents = on("cuda", *case())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(call, inputs, cotangents)  # what is set up once
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, inputs, cotangents)
    inputs.query.mul_(2)
    graph.replay()
    assert_equal(captured, run(call, inputs, cotangents))


def test_nothing_waits_for_the_gpu():
    inputs, cotangents = on("cuda", *case())
    mask = torch.ones(131, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call, inputs, cotangents, attn_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits():
    inputs, cotangents = on("cuda", *case())
    expected = run(call, inputs, cotangents)
    memory = torch.empty(2**31 + inputs.key.numel(), dtype=torch.bfloat16, device="cuda")
    strides = (2**31, *inputs.key.stride()[1:])
    far = memory.as_strided(inputs.key.shape, strides).copy_(inputs.key)
    assert_equal(run(call, inputs._replace(key=far), cotangents), expected)


def test_opcheck():
    inputs, cotangents = on("cuda", *case())
    operands, options = Operands(*inputs), Options()
    output, _, _, teacher_lse, state = torch.ops.attn_kd.attention_kl_forward(*operands, *options)
    saved = (None, None, output, teacher_lse, state)
    grads = (cotangents.output, cotangents.kl.float(), None)
    backward = (*grads, *inputs, *saved, *options)
    torch.library.opcheck(torch.ops.attn_kd.attention_kl_backward.default, backward)
    leaves = Operands(*(tensor.requires_grad_() for tensor in inputs[:3]), *inputs[3:])
    torch.library.opcheck(torch.ops.attn_kd.attention_kl_forward.default, (*leaves, *options))


def test_compile():
    inputs, cotangents = on("cuda", *case())
    compiled = torch.compile(call, fullgraph=True)
    assert_equal(run(compiled, inputs, cotangents), run(call, inputs, cotangents))
