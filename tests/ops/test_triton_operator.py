"""The operators as torch.ops.attn_kd.triton_* offers them, and what they are launched with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import attn_kd
from attn_kd.ops.arguments import Operands, Options
from tests.conftest import HAS_GPU
from tests.ops.cases import (
    Sizes,
    assert_as_accurate_as_eager,
    assert_equal,
    random_cotangents,
    random_inputs,
    run_backend,
)
from tests.ops.conftest import require_backend
from tests.ops.test_operators import KINDS, forward_arguments
from tests.ops.test_operators import REFUSED as REFUSED_BY_ALL

opcheck = torch.library.opcheck

FORWARD = torch.ops.attn_kd.triton_attention_kl_forward
BACKWARD = torch.ops.attn_kd.triton_attention_kl_backward


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    require_backend("triton")
    # Triton's interpreter computes with numpy.
    with torch.device("cuda" if HAS_GPU else "cpu"), np.errstate(all="ignore"):
        yield


def backward_arguments(kind: str, options: Options) -> tuple:
    """Arguments of the backward operator, with cotangents of everything but the LSE."""
    inputs = forward_arguments(kind, options)
    operands, options = Operands(*inputs[:8]), Options(*inputs[8:])
    output, kl, _, own_teacher_lse, row_state = FORWARD(*inputs)
    grad_kl = None if kind == "attention" else torch.randn_like(kl)
    teacher_lse = own_teacher_lse if operands.teacher_lse is None else operands.teacher_lse
    saved = (operands.attn_mask, operands.dropout_seed, output, teacher_lse, row_state)
    return (torch.randn_like(output), grad_kl, None, *operands[:5], *saved, *options)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_schemas_are_those_of_the_compiled_operators(cpu_backend, direction):
    compiled = getattr(torch.ops.attn_kd, f"attention_kl_{direction}").default._schema
    ours = getattr(torch.ops.attn_kd, f"triton_attention_kl_{direction}").default._schema
    assert str(ours) == str(compiled).replace("attn_kd::", "attn_kd::triton_")


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"teacher", "additive", "key padding"}))
def test_opcheck_of_forward(kind):
    arguments = forward_arguments(kind, Options())
    for tensor in arguments[:3]:
        tensor.requires_grad_()
    opcheck(FORWARD.default, arguments)


@pytest.mark.parametrize("kind", ["attention", "dropout", "key padding"])
def test_opcheck_of_backward(kind):
    opcheck(BACKWARD.default, backward_arguments(kind, Options(divergence="forward_kl")))


@pytest.mark.parametrize(
    ("change", "message"),
    [*REFUSED_BY_ALL, ({2: torch.zeros(2, 2, 7, 300)}, "width 300")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shapes_that_would_be_read_past_their_end_are_refused(change, message):
    arguments = list(forward_arguments("teacher", Options()))
    for position, value in change.items():
        is_tensor = isinstance(value, Tensor)
        arguments[position] = value.to(arguments[0].device) if is_tensor else value
    with pytest.raises(ValueError, match=message):
        FORWARD(*arguments)


@pytest.mark.parametrize("position", range(5))
def test_float64_is_refused(position):
    arguments = list(forward_arguments("teacher", Options()))
    arguments[position] = arguments[position].double()
    with pytest.raises(TypeError, match=r"one dtype|float64, expected float32"):
        FORWARD(*arguments)


def test_differentiating_the_gradient_is_refused():
    inputs = random_inputs(Sizes(B=1, H=1))
    query = inputs.query.requires_grad_()
    out = attn_kd.attention_kl(*inputs, backend="triton")
    (grad,) = torch.autograd.grad(out.output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_kl_backward is not implemented"):
        grad.sum().backward()


def test_results_that_are_not_differentiable():
    arguments = [*forward_arguments("teacher", Options())]
    arguments[0].requires_grad_()
    assert [result.requires_grad for result in FORWARD(*arguments)] == [True] * 3 + [False] * 2


def test_the_same_call_gives_the_same_bits():
    sizes = Sizes(B=1, H=2, Lq=130, Lk=260)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    first = run_backend("triton", inputs, cotangents)
    assert_equal(run_backend("triton", inputs, cotangents), first)


@pytest.mark.skipif(HAS_GPU, reason="tilings of the interpreter")
class TestTilings:
    """Many small tiles, whose sums must be moved from one origin to the next."""

    sizes = Sizes(B=1, H=1, Lq=20, Lk=70)

    def run(self, monkeypatch, rescale_above: int, **options) -> None:
        from attn_kd.kernels.triton import configurations

        tiling = configurations.Tiling(16, 16, 4, 1, rescale_above)
        monkeypatch.setattr(configurations, "INTERPRETED", tiling)
        inputs, cotangents = random_inputs(self.sizes), random_cotangents(self.sizes)
        # Logits that grow from tile to tile: by powers of two from below 1 to above 8.
        growing = torch.linspace(0.1, 6, self.sizes.Lk)[:, None]
        inputs = inputs._replace(key=inputs.key * growing, teacher_key=inputs.teacher_key * growing)
        actual = run_backend("triton", inputs, cotangents, **options)
        assert_as_accurate_as_eager(actual, inputs, cotangents, **options)

    @pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
    @pytest.mark.parametrize("rescale_above", [0, 1, 8], ids=lambda n: f"rescaled above {n}")
    def test_sums_that_are_rescaled_seldom_or_always(self, monkeypatch, rescale_above, divergence):
        self.run(monkeypatch, rescale_above, divergence=divergence)

    @pytest.mark.parametrize("rescale_above", [0, 8], ids=lambda n: f"rescaled above {n}")
    def test_rows_that_see_their_first_key_in_a_later_tile(self, monkeypatch, rescale_above):
        mask = torch.rand(self.sizes.Lq, self.sizes.Lk) > 0.3
        mask[3, :40] = mask[4] = False
        self.run(monkeypatch, rescale_above, attn_mask=mask)

    @pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
    @pytest.mark.parametrize("rows", [1, sizes.Lq], ids=["per key", "of pairs"])
    @pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
    def test_every_tile_reads_its_own_part_of_a_mask(self, monkeypatch, divergence, rows, additive):
        mask = torch.rand(1, 1, rows, self.sizes.Lk) > 0.3
        if additive:
            mask = torch.where(mask, 3 * torch.randn(mask.shape), float("-inf"))
        self.run(monkeypatch, 0, attn_mask=mask, divergence=divergence)


REFUSED = """
import torch, attn_kd
q = torch.randn(1, 1, 4, 8)
try:
    attn_kd.attention(q, q, q, backend="triton")
except attn_kd.InputError as error:
    print(error)
try:
    torch.ops.attn_kd.triton_attention_kl_forward(
        q, q, q, None, None, None, None, None, None, None, "reverse_kl", "none", 0.0)
except attn_kd.InputError as error:
    print(error)
"""


def test_tensors_of_the_cpu_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True
    )
    by_function, by_operator = done.stdout.splitlines()
    assert "backend='triton' cannot run here" in by_function
    assert "TRITON_INTERPRET=1" in by_operator


@pytest.mark.gpu
class TestOnAGPU:
    def test_a_call_is_captured_and_replayed(self):
        inputs = random_inputs(Sizes(Lq=130, Lk=200, D=32, Dv=32, Dt=32), torch.bfloat16)
        call = partial(attn_kd.attention_kl, *inputs, dropout_p=0.1, backend="triton")
        call()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        first = captured.kl.clone()
        inputs.query.mul_(2)
        graph.replay()
        torch.testing.assert_close(captured.kl, call().kl)
        assert not torch.equal(captured.kl, first)

    def test_nothing_waits_for_the_device(self):
        inputs = random_inputs(Sizes(), torch.bfloat16)
        leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
        for _ in range(2):  # the first compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                out = attn_kd.attention_kl(*leaves, *inputs[3:], dropout_p=0.1, backend="triton")
                (out.output.sum() + out.kl.sum()).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_the_current_device_need_not_be_that_of_the_tensors(self):
        inputs = random_inputs(Sizes())
        expected = attn_kd.attention_kl(*inputs, backend="triton")
        there = [tensor.to("cuda:1") for tensor in inputs]
        actual = attn_kd.attention_kl(*there, backend="triton")
        torch.testing.assert_close(actual.kl.to("cuda:0"), expected.kl)
