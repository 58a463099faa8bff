"""torch.compile traces the operators as one graph, and its results are those of eager code."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attn_kd
from tests.ops.cases import DIVERGENCES, Sizes, random_cotangents, random_inputs, run

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
by_kernels = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def operator(backend: str, **options) -> Callable:
    def function(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, *rest = tensors
        out = attn_kd.attention_kl(query * 1.5, *rest, backend=backend, **options)
        return out.output + 1, out.kl, out.lse

    return function


def check(
    function: Callable, compiled: Callable, sizes: Sizes, head_reduction: str = "none"
) -> None:
    inputs = random_inputs(sizes)
    cotangents = random_cotangents(sizes, head_reduction=head_reduction)
    torch.manual_seed(3)
    expected = run(function, inputs, cotangents)
    torch.manual_seed(3)
    actual = run(compiled, inputs, cotangents)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@every_divergence
def test_whole_graph(backend, divergence):
    sizes = Sizes()
    mask = torch.rand(sizes.Lq, sizes.Lk) > 0.3
    function = operator(backend, divergence=divergence, attn_mask=mask)
    check(function, torch.compile(function, backend="aot_eager", fullgraph=True), sizes)


# Options are made in the test, on the device that its tensors are on.
KINDS = {
    "no mask": (Sizes(), lambda: {}),
    "head averages": (Sizes(Ht=2), lambda: {"head_reduction": "mean"}),
    "grouped teacher keys": (Sizes(G=3), lambda: {}),
    "row weights": (Sizes(), lambda: {"row_weights": torch.linspace(0, 1, Sizes().Lq)}),
    "dropout": (Sizes(), lambda: {"dropout_p": 0.4}),
}


@pytest.mark.parametrize(("sizes", "make_options"), KINDS.values(), ids=KINDS.keys())
def test_whole_graph_of_every_kind(backend, sizes, make_options):
    options = make_options()
    function = operator(backend, **options)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    check(function, compiled, sizes, options.get("head_reduction", "none"))


@by_kernels
def test_compiled_autograd(backend):
    """The backward pass of an eager call, traced when it runs."""
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    expected = run(operator(backend), inputs, cotangents)

    def compiler(graph: torch.fx.GraphModule) -> Callable:
        return torch.compile(graph, backend="aot_eager")

    with torch._dynamo.compiled_autograd._enable(compiler):
        actual = run(operator(backend), inputs, cotangents)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@by_kernels
def test_attention_and_divergence_alone(backend):
    def function(query, key, value, teacher_query, teacher_key):
        attention = attn_kd.attention(query, key, value, backend=backend)
        alone = attn_kd.attention_kl_div(query, key, teacher_query, teacher_key, backend=backend)
        return attention.output, alone.kl, attention.lse + alone.lse

    check(function, torch.compile(function, backend="aot_eager", fullgraph=True), Sizes())


@by_kernels
def test_dynamic_shapes_are_not_compiled_again(backend):
    function = operator(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    check(function, compiled, Sizes(Lq=13, Lk=29))
    compiled_frames = counter.frame_count
    for Lq, Lk in ((14, 30), (70, 150), (5, 200)):
        check(function, compiled, Sizes(Lq=Lq, Lk=Lk))
    assert counter.frame_count == compiled_frames > 0


@by_kernels
def test_teacher_without_grad_mode_inside_the_graph(backend):
    """As a distiller runs it: the teacher's own attention first, its LSE given on."""

    def function(query, key, value, teacher_query, teacher_key):
        with torch.no_grad():
            lse = attn_kd.attention(teacher_query, teacher_key, teacher_key).lse
        return tuple(
            attn_kd.attention_kl(
                query, key, value, teacher_query, teacher_key, teacher_lse=lse, backend=backend
            )
        )

    check(function, torch.compile(function, backend="aot_eager", fullgraph=True), Sizes())


def test_functional_grad_inside_the_graph(backend):
    inputs = random_inputs(Sizes())

    def loss(query: Tensor) -> Tensor:
        out = attn_kd.attention_kl(query, *inputs[1:], backend=backend)
        return out.output.square().sum() + out.kl.sum()

    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs.query), torch.func.grad(loss)(inputs.query))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor(cpu_backend):
    function = operator(cpu_backend)
    check(function, torch.compile(function, fullgraph=True), Sizes())
