"""The host code of csrc/cuda, on CPU tensors and the emulated GPU: what it accepts and returns."""

from __future__ import annotations

import subprocess

import pytest
import torch
from torch import Tensor

from attn_kd.ops import fake
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import _cuda_refusal, facts_of
from tests.cuda.emulated import ROOT, compile_command, obstacle, torch_headers
from tests.ops.cases import (
    Inputs,
    Sizes,
    assert_as_accurate_as_eager,
    random_cotangents,
    random_inputs,
)
from tests.ops.layouts import LAYOUTS

B, H, Lq, Lk, D = 2, 2, 18, 33, 32
SIZES = Sizes(B=B, H=H, Lq=Lq, Lk=Lk, D=D, Dv=D, Dt=D)
OPTIONS = Options(None, None, "reverse_kl", "none", 0.0)


def operands_of(inputs: Inputs, attn_mask: Tensor | None = None) -> Operands:
    return Operands(*inputs, None, attn_mask, None)


def run(operators, operands: Operands, **options) -> dict[str, Tensor]:
    """Both passes, with cotangents of 1 for output and divergence."""
    chosen = OPTIONS._replace(**options)
    output, kl, lse, teacher_lse, row_state = operators.forward(*operands, *chosen)
    operands = operands._replace(teacher_lse=None)
    grads = operators.backward(
        *(torch.ones_like(output), torch.ones_like(kl), None),
        *(operands.query, operands.key, operands.value),
        *(operands.teacher_query, operands.teacher_key, operands.attn_mask, None),
        *(output, teacher_lse, row_state, *chosen),
    )
    names = ("grad_query", "grad_key", "grad_value")
    return {"output": output, "kl": kl, "lse": lse} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(operators, layout):
    """Rows are read where they lie, or copied where they are not contiguous and aligned."""
    inputs = random_inputs(SIZES, torch.bfloat16)
    expected = run(operators, operands_of(inputs))
    actual = run(operators, operands_of(Inputs(*(layout(tensor) for tensor in inputs))))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_odd_strides_of_dimensions_of_size_1(operators):
    """What such a stride leads to is not aligned, and must not even be the address of no copy."""
    inputs = random_inputs(SIZES._replace(Lq=1, Lk=1), torch.bfloat16)
    odd = (x.as_strided(x.shape, (*x.stride()[:2], D + 1, 1)) for x in inputs)
    expected = run(operators, operands_of(inputs))
    actual = run(operators, operands_of(Inputs(*odd)))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_empty_gradient_of_the_divergence_is_none(operators):
    operands = operands_of(random_inputs(SIZES, torch.bfloat16))
    output, _, _, teacher_lse, row_state = operators.forward(*operands, *OPTIONS)

    def backward(grad_kl: Tensor | None) -> tuple[Tensor, ...]:
        return operators.backward(
            *(torch.ones_like(output), grad_kl, None, *operands[:5], None, None),
            *(output, teacher_lse, row_state, *OPTIONS),
        )

    for actual, expected in zip(backward(torch.zeros(0)), backward(None), strict=True):
        assert torch.equal(actual, expected)


def test_accuracy(operators):
    inputs = random_inputs(SIZES, torch.float16)
    mask = torch.rand(B, 1, 1, Lk) < 0.8
    actual = run(operators, operands_of(inputs, mask))
    ones = random_cotangents(SIZES).only("output", "kl")
    ones = ones._replace(output=torch.ones_like(ones.output), kl=torch.ones_like(ones.kl))
    halves = ones._replace(output=ones.output.half(), kl=ones.kl.half())
    assert_as_accurate_as_eager(actual, inputs, halves, attn_mask=mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("teacher", ["none", "lse", "no lse"])
def test_results_are_those_of_the_fake_kernels(operators, layout, teacher):
    inputs = Inputs(*(layout(tensor) for tensor in random_inputs(SIZES, torch.bfloat16)))
    if teacher == "none":
        inputs = inputs._replace(teacher_query=None, teacher_key=None)
    operands = operands_of(inputs)
    if teacher == "lse":
        operands = operands._replace(teacher_lse=torch.zeros(B, H, Lq))
    real = operators.forward(*operands, *OPTIONS)
    imagined = fake.attention_kl_forward(*operands, *OPTIONS)
    real += operators.backward(
        *(torch.ones_like(real[0]), None, None, *inputs[:3], None, None, None, None),
        *(real[0], None, real[4], *OPTIONS),
    )
    imagined += fake.attention_kl_backward(None, None, None, *inputs[:3])
    for a, b in zip(real, imagined, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def changed(**changes: Tensor | None) -> Operands:
    return operands_of(random_inputs(SIZES, torch.bfloat16))._replace(**changes)


def sized(dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Operands:
    return operands_of(random_inputs(SIZES._replace(**sizes), dtype))


CALLS = {
    "plain": (changed(), {}),
    "float16": (sized(torch.float16), {}),
    "head_dim 64": (sized(D=64, Dv=64, Dt=64), {}),
    "no teacher": (changed(teacher_query=None, teacher_key=None), {}),
    "key padding": (changed(attn_mask=torch.ones(B, 1, 1, Lk, dtype=torch.bool)), {}),
    "expanded mask": (changed(attn_mask=torch.randn(B, 1, 1, Lk).expand(B, H, Lq, Lk)), {}),
    "expanded float64 mask": (
        changed(attn_mask=torch.zeros(Lk, dtype=torch.float64).expand(Lq, Lk)),
        {},
    ),
    "float64 mask": (changed(attn_mask=torch.zeros(Lk, dtype=torch.float64)), {}),
    "float32": (sized(torch.float32), {}),
    "head_dim 40": (sized(D=40, Dv=40, Dt=40), {}),
    "wider value": (sized(Dv=64), {}),
    "wider teacher": (sized(Dt=64), {}),
    "teacher of another dtype": (
        changed(teacher_query=torch.zeros(B, H, Lq, D), teacher_key=torch.zeros(B, H, Lk, D)),
        {},
    ),
    "groups of teacher keys": (sized(G=2), {}),
    "mask of pairs": (changed(attn_mask=torch.ones(Lq, Lk, dtype=torch.bool)), {}),
    "forward_kl": (changed(), {"divergence": "forward_kl"}),
    "averaged heads": (changed(), {"head_reduction": "mean"}),
    "dropout": (changed(), {"dropout_p": 0.5}),
}


@pytest.mark.parametrize(("operands", "options"), CALLS.values(), ids=CALLS.keys())
def test_refuses_what_the_choice_of_backends_refuses(operators, operands, options):
    options = OPTIONS._replace(**options)
    refused = _cuda_refusal(facts_of(operands, options)) is not None
    if not refused:
        operators.forward(*operands, *options)
        return
    with pytest.raises((ValueError, TypeError), match="backend 'cuda'"):
        operators.forward(*operands, *options)


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_registration_compiles_beside_a_cpu_torch():
    for name in ("library", "stream"):
        source = ROOT / "csrc" / "cuda" / f"{name}.cpp"
        command = [*compile_command(), *torch_headers(), "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
