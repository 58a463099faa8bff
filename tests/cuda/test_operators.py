"""The host code of csrc/cuda, on CPU tensors and the emulated GPU: what it accepts and returns."""

from __future__ import annotations

import ctypes
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
STREAM = 0x100  # the address that emulation/operators.cc gives
ROW = torch.zeros(1, 1, 1, D, dtype=torch.bfloat16)


def operands_of(inputs: Inputs, attn_mask: Tensor | None = None) -> Operands:
    return Operands(*inputs, None, attn_mask, None)


def run(operators, operands: Operands, **options) -> dict[str, Tensor]:
    """Both passes, with cotangents of 1 for output and divergence."""
    chosen = OPTIONS._replace(**options)
    results = operators.forward(*operands, *chosen)
    output, kl, lse, _, _ = results
    ones = (torch.ones_like(output), torch.ones_like(kl))
    grads = differentiate(operators, operands, results, *ones, options=chosen)
    names = ("grad_query", "grad_key", "grad_value")
    return {"output": output, "kl": kl, "lse": lse} | dict(zip(names, grads, strict=True))


def differentiate(
    operators,
    operands: Operands,
    results: tuple[Tensor, ...],
    grad_output: Tensor | None,
    grad_kl: Tensor | None,
    *,
    options: Options = OPTIONS,
) -> tuple[Tensor, ...]:
    """The backward operator, on what the forward operator returned."""
    output, _, _, teacher_lse, row_state = results
    return operators.backward(
        *(grad_output, grad_kl, None),
        *(operands.query, operands.key, operands.value),
        *(operands.teacher_query, operands.teacher_key, operands.attn_mask, None),
        *(output, teacher_lse, row_state, *options),
    )


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


def test_heads_that_share_keys(operators):
    """Strides of 0, as expand leaves them."""
    shared = random_inputs(SIZES._replace(H=1), torch.bfloat16)
    expanded = Inputs(*(x.expand(B, H, -1, -1) for x in shared))
    expected = run(operators, operands_of(Inputs(*(x.clone() for x in expanded))))
    actual = run(operators, operands_of(expanded))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_gradient_of_a_sum_has_no_strides(operators):
    operands = operands_of(random_inputs(SIZES, torch.bfloat16))
    results = operators.forward(*operands, *OPTIONS)
    one = torch.ones((), dtype=torch.bfloat16).expand(B, H, Lq, D)
    actual = differentiate(operators, operands, results, one, None)
    expected = differentiate(operators, operands, results, one.contiguous(), None)
    assert all(map(torch.equal, actual, expected))


def test_empty_gradient_of_the_divergence_is_none(operators):
    operands = operands_of(random_inputs(SIZES, torch.bfloat16))
    results = operators.forward(*operands, *OPTIONS)
    ones = torch.ones_like(results[0])
    actual = differentiate(operators, operands, results, ones, torch.zeros(0))
    expected = differentiate(operators, operands, results, ones, None)
    assert all(map(torch.equal, actual, expected))


def test_both_passes_are_launched_on_the_current_stream(operators, library):
    operands = operands_of(random_inputs(SIZES, torch.bfloat16))
    results = operators.forward(*operands, *OPTIONS)
    assert library.emulation_last_stream() == STREAM
    library.emulation_reset(1)
    differentiate(operators, operands, results, torch.ones_like(results[0]), None)
    assert library.emulation_last_stream() == STREAM


def test_failure_of_a_launch_is_an_error(operators, library):
    operands = operands_of(random_inputs(SIZES, torch.bfloat16))
    results = operators.forward(*operands, *OPTIONS)
    failure = pytest.raises(RuntimeError, match=r"was not launched: block 0, .* outside")
    readable = ctypes.create_string_buffer(1)
    library.emulation_add_buffer(readable, 1, 0)  # and nothing else
    with failure:
        operators.forward(*operands, *OPTIONS)
    with failure:
        differentiate(operators, operands, results, torch.ones_like(results[0]), None)


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


WRONG = {
    "rank": (changed(query=torch.zeros(B, Lq, D).bfloat16()), {}, "must have 4 dimensions"),
    "heads of key": (
        changed(key=torch.zeros(B, 1, Lk, D).bfloat16()),
        {},
        r"key has shape \[2, 1,",
    ),
    "length of value": (
        changed(value=torch.zeros(B, H, 1, D).bfloat16()),
        {},
        r"value has shape \[2, 2, 1, 32\], expected \[2, 2, 33, 32\]",
    ),
    "dtype of value": (changed(value=torch.zeros(B, H, Lk, D)), {}, "value is Float but query is"),
    "no teacher_key": (changed(teacher_key=None), {}, "teacher_query and teacher_key come"),
    "shape of teacher_lse": (changed(teacher_lse=torch.zeros(B, H)), {}, "teacher_lse has shape"),
    "no number in teacher_lse": (changed(teacher_lse=torch.zeros(0)), {}, "teacher_lse is empty"),
    "integer mask": (
        changed(attn_mask=torch.zeros(Lk, dtype=torch.int64)),
        {},
        "attn_mask is Long",
    ),
    "length of mask": (changed(attn_mask=torch.zeros(Lk + 1)), {}, r"attn_mask has shape \[34\]"),
    "infinite scale": (changed(), {"scale": float("inf")}, "scale is inf"),
    "no number as scale": (changed(), {"teacher_scale": float("nan")}, "teacher_scale is nan"),
    "empty batch": (sized(B=0), {}, "expected no empty dimension"),
    "no heads": (sized(H=0), {}, "expected no empty dimension"),
    "no queries": (sized(Lq=0), {}, "expected no empty dimension"),
    "no keys": (sized(Lk=0), {}, "expected no empty dimension"),
    "more than 2^30 rows": (
        operands_of(Inputs(*(ROW.expand(2**15, 2**15, 1, D) for _ in range(5)))),
        {},
        "more rows than backend 'cuda' can count",
    ),
}


@pytest.mark.parametrize(("operands", "options", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(operators, operands, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        operators.forward(*operands, *OPTIONS._replace(**options))


WRONG_BACKWARD = {
    "dtype of grad_output": (
        0,
        torch.zeros(B, H, Lq, D),
        "grad_output is Float but query is BFloat16",
    ),
    "shape of grad_output": (
        0,
        torch.zeros(B, H, 1, D).bfloat16(),
        r"grad_output has shape \[2, 2, 1, 32\], expected",
    ),
    "shape of grad_kl": (
        1,
        torch.zeros(B, Lq),
        r"grad_kl has shape \[2, 18\], expected \[2, 2, 18\]",
    ),
    "dtype of grad_lse": (
        2,
        torch.zeros(B, H, Lq, dtype=torch.int64),
        "grad_lse is Long, expected floating",
    ),
    "no teacher_lse": (11, None, "teacher_lse is missing beside grad_kl"),
    "no row_state": (12, torch.zeros(0), "row_state is empty"),
    "shape of row_state": (
        12,
        torch.zeros(B, H, Lq),
        r"row_state has shape \[2, 2, 18\], expected \[3, 2, 2, 18\]",
    ),
}


@pytest.mark.parametrize(
    ("position", "wrong", "message"), WRONG_BACKWARD.values(), ids=WRONG_BACKWARD.keys()
)
def test_wrong_arguments_of_the_backward_pass(operators, position, wrong, message):
    operands = operands_of(random_inputs(SIZES, torch.bfloat16))
    output, kl, lse, teacher_lse, row_state = operators.forward(*operands, *OPTIONS)
    saved = (None, None, output, teacher_lse, row_state)
    arguments = [output, kl, lse, *operands[:5], *saved, *OPTIONS]
    arguments[position] = wrong
    with pytest.raises((ValueError, TypeError), match=message):
        operators.backward(*arguments)


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_registration_compiles_beside_a_cpu_torch():
    for name in ("library", "stream"):
        source = ROOT / "csrc" / "cuda" / f"{name}.cpp"
        command = [*compile_command(), *torch_headers(), "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
