"""Autograd: gradcheck, the operators' registration, checkpointing, partial gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attn_kd
from attn_kd.ops.arguments import Operands, Options
from tests.ops.cases import (
    DIVERGENCES,
    HEAD_REDUCTIONS,
    Cotangents,
    Results,
    Sizes,
    assert_equal,
    random_cotangents,
    random_inputs,
    run,
    run_backend,
)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
by_kernels = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)

SMALL = Sizes(B=1, H=2, Lq=4, Lk=5, D=3, Dv=2, Dt=4)


def small_mask(kind: str) -> Tensor | None:
    if kind == "no mask":
        return None
    visible = torch.rand(SMALL.B, 1, SMALL.Lq, SMALL.Lk) > 0.3
    visible[:, :, 1] = False  # a row that sees nothing
    if kind == "bool":
        return visible
    return torch.randn(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)


@every_divergence
@pytest.mark.parametrize("kind", ["no mask", "bool", "additive"])
@pytest.mark.parametrize("given", [False, True], ids=["computes teacher_lse", "given teacher_lse"])
def test_gradcheck(backend, divergence, kind, given):
    inputs, mask = random_inputs(SMALL, torch.float64), small_mask(kind)
    teacher_lse = None
    if given:
        no_value = inputs.teacher_key
        teacher_lse = attn_kd.attention(*inputs[3:], no_value, attn_mask=mask, scale=1.3).lse

    def function(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        output, kl, lse = attn_kd.attention_kl(
            query,
            key,
            value,
            *inputs[3:],
            attn_mask=mask,
            teacher_lse=teacher_lse,
            scale=0.8,
            teacher_scale=1.3,
            divergence=divergence,
            backend=backend,
        )
        # a difference of infinities is not a number: leave rows that see nothing to test_masks.py
        return output, kl, lse.masked_fill(lse == -torch.inf, 0)

    student = [tensor.requires_grad_() for tensor in inputs[:3]]
    assert torch.autograd.gradcheck(function, student)


def test_gradcheck_of_attention(backend):
    inputs = [t.requires_grad_() for t in random_inputs(SMALL, torch.float64)[:3]]
    assert torch.autograd.gradcheck(
        lambda q, k, v: tuple(attn_kd.attention(q, k, v, backend=backend)), inputs
    )


@every_divergence
def test_gradcheck_of_the_divergence_alone(backend, divergence):
    inputs = random_inputs(SMALL, torch.float64)
    student = [t.requires_grad_() for t in inputs[:2]]

    def function(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            attn_kd.attention_kl_div(
                query, key, *inputs[3:], divergence=divergence, backend=backend
            )
        )

    assert torch.autograd.gradcheck(function, student)


@pytest.mark.parametrize(
    "wanted", [w for n in (1, 2) for w in itertools.combinations(("query", "key", "value"), n)]
)
def test_gradient_of_some_inputs_alone(backend, wanted):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    all_grads = run_backend(backend, inputs, cotangents)
    leaves = {name: getattr(inputs, name).requires_grad_() for name in wanted}
    results = attn_kd.attention_kl(*inputs, backend=backend)
    differentiable = [pair for pair in zip(results, cotangents, strict=True) if pair[0].grad_fn]
    grads = torch.autograd.grad(
        [result for result, _ in differentiable],
        list(leaves.values()),
        [cotangent for _, cotangent in differentiable],
    )
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, all_grads[f"grad_{name}"])


@pytest.mark.filterwarnings("ignore:a teacher tensor requires grad")
def test_the_teacher_gets_no_gradient(backend):
    inputs = [tensor.requires_grad_() for tensor in random_inputs(Sizes())]
    out = attn_kd.attention_kl(*inputs, backend=backend)
    (out.output.sum() + out.kl.sum() + out.lse.sum()).backward()
    assert inputs[3].grad is None and inputs[4].grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(backend, mode):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    expected = run_backend(backend, inputs, cotangents)
    inputs.query.requires_grad_()
    with mode():
        out = attn_kd.attention_kl(*inputs, backend=backend)
    assert not any(result.requires_grad for result in out)
    for name, result in out._asdict().items():
        torch.testing.assert_close(result, expected[name])


def test_gradients_accumulate(backend):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    expected = run_backend(backend, inputs, cotangents)
    inputs.query.requires_grad_()
    for _ in range(2):
        out = attn_kd.attention_kl(*inputs, backend=backend)
        torch.autograd.backward(out, cotangents)
    torch.testing.assert_close(inputs.query.grad, 2 * expected["grad_query"])


def test_backward_twice_over_a_retained_graph(backend):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    inputs.query.requires_grad_()
    out = attn_kd.attention_kl(*inputs, backend=backend)
    first, second = (
        torch.autograd.grad(out, inputs.query, cotangents, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@by_kernels
def test_differentiating_the_gradient_is_refused(backend):
    inputs = random_inputs(Sizes())
    query = inputs.query.requires_grad_()
    out = attn_kd.attention_kl(*inputs, backend=backend)
    (grad,) = torch.autograd.grad(out.output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_kl_backward is not implemented"):
        grad.sum().backward()


def test_differentiating_the_gradient_of_the_python_function_is_refused(cpu_backend):
    inputs = random_inputs(Sizes())
    query = inputs.query.requires_grad_()
    output = attn_kd.FusedAttentionKL.apply(*Operands(*inputs), *Options())[0]
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@every_divergence
def test_activation_checkpointing(backend, reentrant, divergence):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())

    def checkpointed(*tensors: Tensor) -> tuple[Tensor, ...]:
        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(attn_kd.attention_kl(*tensors, divergence=divergence, backend=backend))

        return checkpoint(function, *tensors, use_reentrant=reentrant)

    expected = run_backend(backend, inputs, cotangents, divergence=divergence)
    # reentrant checkpoints support backward() alone
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    results = checkpointed(*leaves, *inputs[3:])
    torch.autograd.backward(results, cotangents)
    for leaf, name in zip(leaves, ("query", "key", "value"), strict=True):
        assert torch.equal(leaf.grad, expected[f"grad_{name}"]), name


@every_divergence
def test_functional_vjp(backend, divergence):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    expected = run_backend(backend, inputs, cotangents, divergence=divergence)

    def function(*student: Tensor) -> tuple[Tensor, ...]:
        options = {"divergence": divergence, "backend": backend}
        return tuple(attn_kd.attention_kl(*student, *inputs[3:], **options))

    results, vjp = torch.func.vjp(function, *inputs[:3])
    assert torch.equal(results[1], expected["kl"])
    for name, grad in zip(("query", "key", "value"), vjp(tuple(cotangents)), strict=True):
        assert torch.equal(grad, expected[f"grad_{name}"]), name


def test_functional_grad_within_a_graph(backend):
    """The outer graph goes on through what the inner level computes."""
    inputs = random_inputs(Sizes())

    def loss(value: Tensor, query: Tensor) -> Tensor:
        out = attn_kd.attention_kl(query, inputs.key, value, *inputs[3:], backend=backend)
        return out.output.sum() + out.kl.sum()

    leaf = inputs.query.requires_grad_()
    _, result = torch.func.grad_and_value(loss)(inputs.value, leaf)
    (actual,) = torch.autograd.grad(result, leaf)
    (expected,) = torch.autograd.grad(loss(inputs.value, leaf), leaf)
    assert torch.equal(actual, expected)


@by_kernels
def test_the_derivative_of_a_functional_gradient_is_refused(backend):
    inputs = random_inputs(Sizes(B=1, H=1))

    def loss(query: Tensor) -> Tensor:
        return attn_kd.attention_kl(query, *inputs[1:], backend=backend).output.square().sum()

    with pytest.raises(RuntimeError, match="attention_kl_backward is not implemented"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query).sum())(inputs.query)


@every_divergence
@pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
@pytest.mark.parametrize("reached", [*Cotangents._fields, "all"])
def test_the_python_function_equals_the_operator(cpu_backend, divergence, head_reduction, reached):
    """Its setup and backward in Python against those of csrc/autograd.cpp, bit for bit."""
    inputs, cotangents = (
        random_inputs(Sizes()),
        random_cotangents(Sizes(), torch.float32, head_reduction),
    )
    if reached != "all":
        cotangents = cotangents.only(reached)
    mask = torch.rand(Sizes().Lq, Sizes().Lk) > 0.3
    seed = torch.tensor([5, 6])
    options = Options(0.5, 0.25, divergence, head_reduction, 0.2)

    def by(call: Callable) -> Results:
        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return call(*Operands(*tensors, attn_mask=mask, dropout_seed=seed), *options)[:3]

        return run(function, inputs, cotangents)

    assert_equal(by(attn_kd.FusedAttentionKL.apply), by(torch.ops.attn_kd.attention_kl_forward))


def test_results_that_are_not_differentiable(cpu_backend):
    inputs = [tensor.requires_grad_() for tensor in random_inputs(Sizes())[:3]]
    teacher = random_inputs(Sizes())[3:]
    arguments = (*Operands(*inputs, *teacher), *Options())
    for call in (attn_kd.FusedAttentionKL.apply, torch.ops.attn_kd.attention_kl_forward):
        assert [result.requires_grad for result in call(*arguments)] == [True] * 3 + [False] * 2


@by_kernels
def test_forward_mode_is_refused(backend):
    """Silently dropping the tangents would be worse."""
    inputs = random_inputs(Sizes())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.query, torch.ones_like(inputs.query))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            attn_kd.attention_kl(dual, *inputs[1:], backend=backend)


@pytest.mark.gpu
def test_the_python_function_on_a_gpu_is_over_the_triton_operators():
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    inputs, cotangents = (type(x)(*(t.cuda() for t in x)) for x in (inputs, cotangents))

    def by(call: Callable) -> Results:
        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return call(*Operands(*tensors), *Options())[:3]

        return run(function, inputs, cotangents)

    operator = torch.ops.attn_kd.triton_attention_kl_forward
    assert_equal(by(attn_kd.FusedAttentionKL.apply), by(operator))


def test_the_device_decides_the_operator_of_the_python_function():
    """Tensors of a CUDA device that are traced alone: what they call is seen without a GPU."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    for device in ("cpu", "cuda"):
        with FakeTensorMode(), Recorder():
            inputs = [torch.empty(1, 2, 5, 8, device=device) for _ in range(5)]
            attn_kd.FusedAttentionKL.apply(*Operands(*inputs), *Options())
    forwards = [name for name in called if "attention_kl_forward" in name]
    assert forwards == [
        "attn_kd.attention_kl_forward.default",
        "attn_kd.triton_attention_kl_forward.default",
    ]
