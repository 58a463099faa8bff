"""The short way from Python to the compiled operator, and when the long one is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attn_kd
from attn_kd import InputError
from attn_kd.ops import dispatch, extension, philox
from attn_kd.ops.arguments import Operands, Options
from tests.ops.cases import (
    DIVERGENCES,
    HEAD_REDUCTIONS,
    Sizes,
    assert_equal,
    random_cotangents,
    random_inputs,
    run,
)

SIZES = Sizes()

by_kernels = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
needs_extension = pytest.mark.usefixtures("cpu_backend")

# What the operators are called in torch.ops.attn_kd.
PREFIX = {"cpu": "attn_kd.attention_kl", "triton": "attn_kd.triton_attention_kl"}


def call(*tensors: Tensor, backend: str = "cpu", **options) -> attn_kd.AttentionKLOutput:
    return attn_kd.attention_kl(*tensors, backend=backend, **options)


@by_kernels
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
def test_both_ways_give_the_same(backend, divergence, head_reduction):
    inputs = random_inputs(SIZES)
    cotangents = random_cotangents(SIZES, head_reduction=head_reduction)
    options = Options(0.5, 0.4, divergence, head_reduction)

    def checked(*tensors: Tensor) -> tuple[Tensor, ...]:
        return dispatch._run_checked(Operands(*tensors), options, backend)

    short = run(call, inputs, cotangents, backend=backend, **options._asdict())
    assert_equal(short, run(checked, inputs, cotangents))


def test_a_seed_is_drawn_once_a_call(backend):
    torch.manual_seed(1)
    philox.draw_seed(torch.get_default_device())
    expected = torch.rand(1)
    torch.manual_seed(1)
    attn_kd.attention(*random_ones(), dropout_p=0.5, backend=backend)
    assert torch.equal(torch.rand(1), expected)


def random_ones() -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors that take nothing from the generator."""
    return tuple(torch.ones(1, 2, 5, 8) for _ in range(3))


class Marked(Tensor):
    """A tensor with a class of its own, as data pipelines make them."""


@by_kernels
@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda x: x.as_subclass(Marked)])
def test_kinds_of_tensors(backend, make):
    inputs = random_inputs(SIZES)
    expected = call(*inputs, backend=backend)
    actual = call(make(inputs.query), *inputs[1:], backend=backend)
    torch.testing.assert_close(actual.kl.as_subclass(Tensor), expected.kl, rtol=0, atol=0)


@by_kernels
@pytest.mark.parametrize("scale", [1, torch.tensor(1.0), True], ids=repr)
def test_kinds_of_numbers(backend, scale):
    inputs = random_inputs(SIZES)
    actual, expected = (call(*inputs, scale=s, backend=backend).kl for s in (scale, 1.0))
    assert torch.equal(actual, expected)


@by_kernels
def test_function_modes_see_the_operator(backend):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        call(*random_inputs(SIZES), backend=backend)
    assert any(f"{PREFIX[backend]}_forward" in name for name in seen)


@by_kernels
def test_dispatch_modes_see_the_operator_and_its_gradient(backend):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = random_inputs(SIZES)
    inputs.query.requires_grad_()
    with Mode():
        call(*inputs, backend=backend).kl.sum().backward()
    assert f"{PREFIX[backend]}_forward.default" in seen
    assert f"{PREFIX[backend]}_backward.default" in seen


@by_kernels
@pytest.mark.parametrize(
    "error", [StopIteration, TypeError, InputError], ids=lambda kind: kind.__name__
)
def test_what_python_raises_on_the_way_comes_out(backend, error):
    """Checkpoints end a recomputation by an exception in a hook on saved tensors.

    One of a refusal's type is none: the call is not made again, which would run the hooks again.
    """
    saved = []

    def hook(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        raise error("from a hook")

    inputs = random_inputs(SIZES)
    inputs.query.requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor),
        pytest.raises(error, match="from a hook"),
    ):
        call(*inputs, backend=backend)
    assert len(saved) == 1


@by_kernels
def test_tensors_of_two_devices_in_inference_mode(backend):
    """There no Autograd kernel looks at the devices first."""
    inputs = random_inputs(SIZES)
    with torch.inference_mode(), pytest.raises(InputError, match="key is on meta"):
        call(inputs.query, inputs.key.to("meta"), *inputs[2:], backend=backend)


@needs_extension
def test_the_short_way_counts_its_arguments():
    with pytest.raises(TypeError, match="takes 13 arguments, got 1"):
        extension.module.attention_kl(torch.zeros(1))


@needs_extension
def test_a_lack_of_memory_is_no_refusal():
    """What is not about the arguments is raised at once, and not tried again the long way."""
    huge = torch.ones(1, 1, 1, 8).expand(2**20, 1, 2**30, 8)
    key = torch.ones(1, 1, 1, 8).expand(2**20, 1, 1, 8)
    arguments = (huge, key, key, None, None, None, None, None, 1.0, None, "reverse_kl", "none", 0.0)
    with pytest.raises(RuntimeError, match="memory"):
        extension.module.attention_kl(*arguments)
