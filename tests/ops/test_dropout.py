"""Dropout: on the output path alone, the same noise in both directions and in every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attn_kd
from attn_kd.ops import extension, philox
from tests.ops import explicit
from tests.ops.cases import (
    DIVERGENCES,
    HEAD_REDUCTIONS,
    Cotangents,
    Inputs,
    Results,
    Sizes,
    assert_accurate,
    assert_equal,
    name_of,
    random_cotangents,
    random_inputs,
    run,
    run_backend,
)

P = 0.3
SIZES = Sizes(Lq=70, Lk=150)
MAP = (SIZES.B, SIZES.H, SIZES.Lq, SIZES.Lk)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_reduction = pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)
by_kernels = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)


def kept_after(seed: int) -> Tensor:
    """What a call right after torch.manual_seed(seed) keeps."""
    torch.manual_seed(seed)
    return philox.keep_mask(philox.draw_seed(torch.get_default_device()), P, MAP)


def run_seeded(backend: str, inputs: Inputs, cotangents: Cotangents, **options) -> Results:
    torch.manual_seed(7)
    return run_backend(backend, inputs, cotangents, dropout_p=P, **options)


def dropped_map(backend: str, inputs: Inputs, **options) -> Tensor:
    """The attention map that reaches the output: the value is the identity."""
    identity = torch.eye(SIZES.Lk).expand(SIZES.B, SIZES.H, -1, -1)
    return attn_kd.attention(*inputs[:2], identity, backend=backend, **options).output


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of
)
@every_divergence
@every_reduction
def test_values_and_gradients(backend, head_reduction, divergence, dtype):
    inputs = random_inputs(SIZES, dtype)
    cotangents = random_cotangents(SIZES, dtype, head_reduction)
    options = {"divergence": divergence, "head_reduction": head_reduction}
    actual = run_seeded(backend, inputs, cotangents, **options)
    options |= {"kept": kept_after(7), "dropout_p": P}
    in_double = Cotangents(*(cotangent.double() for cotangent in cotangents))
    truth = run(explicit.attention_kl, inputs.to(torch.float64), in_double, **options)
    eager = run(explicit.attention_kl, inputs, cotangents, **options)
    assert_accurate(actual, eager, truth)


def test_what_is_kept_is_scaled_and_the_rest_is_zero(backend):
    inputs = random_inputs(SIZES)
    undropped = dropped_map(backend, inputs)
    torch.manual_seed(7)
    dropped = dropped_map(backend, inputs, dropout_p=P)
    kept = kept_after(7)
    assert torch.equal(dropped != 0, kept)
    torch.testing.assert_close(dropped[kept], undropped[kept] / (1 - P))


@every_reduction
def test_divergence_and_lse_are_undropped(backend, head_reduction):
    inputs = random_inputs(SIZES)
    cotangents = random_cotangents(SIZES, head_reduction=head_reduction).only("kl", "lse")
    dropped = run_seeded(backend, inputs, cotangents, head_reduction=head_reduction)
    expected = run_backend(backend, inputs, cotangents, head_reduction=head_reduction)
    del dropped["output"], expected["output"]
    assert_equal(dropped, expected)


def test_manual_seed_repeats_a_call_and_the_next_call_differs(backend):
    inputs = random_inputs(SIZES)
    torch.manual_seed(11)
    first, second = (dropped_map(backend, inputs, dropout_p=P) != 0 for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(dropped_map(backend, inputs, dropout_p=P) != 0, first)
    # 2 p (1 - p) of the pairs are kept in one of two independent masks alone
    assert abs((first != second).double().mean() - 2 * P * (1 - P)) < 0.01


def test_no_noise_is_drawn_without_dropout(backend):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    attn_kd.attention(*random_inputs_without_noise(), backend=backend)
    assert torch.equal(torch.rand(1), expected)


def random_inputs_without_noise() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8) for _ in range(3))


@by_kernels
def test_kernels_keep_what_the_reference_keeps(backend):
    inputs = random_inputs(SIZES)
    masks = []
    for name in (backend, "reference"):
        torch.manual_seed(13)
        masks.append(dropped_map(name, inputs, dropout_p=P) != 0)
    assert torch.equal(*masks)


@by_kernels
@pytest.mark.parametrize("Lk", [1, 95, 96, 97, 400], ids=lambda n: f"{n} keys")
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True, ids=lambda n: f"{n} threads")
def test_every_size_and_number_of_threads_keeps_the_same(backend, threads, Lk):
    """Where tiles and tasks begin and end is not seen."""
    sizes = Sizes(B=1, H=2, Lq=131, Lk=Lk, D=4, Dv=4, Dt=4)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes).only("output")
    actual = run_seeded(backend, inputs, cotangents)
    expected = run_seeded("reference", inputs, cotangents)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


@pytest.mark.usefixtures("cpu_backend")
def test_every_instruction_set_keeps_the_same():
    module = extension.module
    inputs, before = random_inputs(SIZES), module.instruction_set()
    masks = []
    try:
        for name in module.supported_instruction_sets():
            module.set_instruction_set(name)
            torch.manual_seed(17)
            masks.append(dropped_map("cpu", inputs, dropout_p=P) != 0)
    finally:
        module.set_instruction_set(before)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_backward_twice_uses_the_same_noise(backend):
    inputs = random_inputs(SIZES)
    value = inputs.value.requires_grad_()
    out = attn_kd.attention(*inputs[:2], value, dropout_p=P, backend=backend).output
    first, second = (torch.autograd.grad(out.sum(), value, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_repeats_the_noise(backend, reentrant):
    inputs = random_inputs(SIZES)
    plain, recomputed = (inputs.value.clone().requires_grad_() for _ in range(2))

    def output(value: Tensor) -> Tensor:
        return attn_kd.attention(*inputs[:2], value, dropout_p=P, backend=backend).output

    torch.manual_seed(19)
    output(plain).sum().backward()
    torch.manual_seed(19)
    checkpoint(output, recomputed, use_reentrant=reentrant).sum().backward()
    assert torch.equal(plain.grad, recomputed.grad)


def test_under_a_mask(backend):
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    mask = torch.rand(SIZES.B, 1, SIZES.Lq, SIZES.Lk) > 0.4
    mask[:, :, 5] = False
    actual = run_seeded(backend, inputs, cotangents, attn_mask=mask)
    options = {"attn_mask": mask, "kept": kept_after(7), "dropout_p": P}
    in_double = Cotangents(*(cotangent.double() for cotangent in cotangents))
    truth = run(explicit.attention_kl, inputs.to(torch.float64), in_double, **options)
    eager = run(explicit.attention_kl, inputs, cotangents, **options)
    assert_accurate(actual, eager, truth)


@every_divergence
@every_reduction
def test_gradcheck(backend, divergence, head_reduction):
    sizes = Sizes(B=1, H=2, Lq=4, Lk=5, D=3, Dv=2, Dt=4)
    inputs = random_inputs(sizes, torch.float64)

    def function(*student: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(23)
        return tuple(
            attn_kd.attention_kl(
                *student,
                *inputs[3:],
                divergence=divergence,
                head_reduction=head_reduction,
                dropout_p=P,
                backend=backend,
            )
        )

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs[:3]])
