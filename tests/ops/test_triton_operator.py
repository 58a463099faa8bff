"""The operators as torch.ops.attn_kd.triton_* offers them, and what they are launched with."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_kd.ops import triton_layouts, triton_problem
from attn_kd.ops.arguments import Operands, Options
from tests.conftest import HAS_GPU
from tests.ops.cases import DIVERGENCES
from tests.ops.conftest import require_backend
from tests.ops.layouts import far_apart
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
    """But that gradients can be left out."""
    compiled = getattr(torch.ops.attn_kd, f"attention_kl_{direction}").default._schema
    ours = getattr(torch.ops.attn_kd, f"triton_attention_kl_{direction}").default._schema
    without_mask = str(ours).replace(", *, bool[3] output_mask=[True, True, True]", "")
    assert without_mask == str(compiled).replace("attn_kd::", "attn_kd::triton_")


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


def test_results_that_are_not_differentiable():
    arguments = [*forward_arguments("teacher", Options())]
    arguments[0].requires_grad_()
    assert [result.requires_grad for result in FORWARD(*arguments)] == [True] * 3 + [False] * 2


MODES = {
    "one pass": Options(),
    **{f"two passes, {name}": Options(divergence=name) for name in DIVERGENCES[2:]},
    "head averages": Options(head_reduction="mean"),
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
SOME_GRADIENTS = [mask for mask in itertools.product((False, True), repeat=3) if 0 < sum(mask) < 3]


def named(mask: tuple[bool, ...]) -> str:
    return " and ".join(n for n, m in zip(("query", "key", "value"), mask, strict=True) if m)


@every_mode
@pytest.mark.parametrize("mask", SOME_GRADIENTS, ids=named)
def test_gradients_that_are_not_wanted_come_back_empty(options, mask):
    arguments = backward_arguments("key padding", options)
    for grad, full, is_wanted in zip(
        BACKWARD(*arguments, output_mask=mask), BACKWARD(*arguments), mask, strict=True
    ):
        assert torch.equal(grad, full) if is_wanted else grad.shape == (0,)


@pytest.mark.parametrize("mask", SOME_GRADIENTS, ids=named)
def test_kernels_run_for_gradients_that_are_wanted_alone(monkeypatch, mask):
    from attn_kd.ops import triton_launch

    arguments = backward_arguments("teacher", Options())
    kernels, run = [], triton_launch.Launch.run

    def recorded(launch: triton_launch.Launch) -> None:
        kernels.append(launch.kernel)
        run(launch)

    monkeypatch.setattr(triton_launch.Launch, "run", recorded)
    BACKWARD(*arguments, output_mask=mask)
    of_query, of_key, of_value = mask
    assert (triton_launch.backward_rows_kernel in kernels) == of_query
    assert (triton_launch.backward_keys_kernel in kernels) == (of_key or of_value)


@every_mode
def test_an_empty_gradient_of_the_divergence_is_none(options):
    of_output, _, *rest = backward_arguments("key padding", options)
    for grad, expected in zip(
        BACKWARD(of_output, torch.empty(0), *rest), BACKWARD(of_output, None, *rest), strict=True
    ):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("mask", [(False, False, True), (True, True, True)], ids=named)
def test_the_value_of_an_output_that_nobody_differentiates_has_a_gradient_of_zero(mask):
    _, *rest = backward_arguments("teacher", Options())
    grad_value = BACKWARD(None, *rest, output_mask=mask)[2]
    assert torch.equal(grad_value, torch.zeros_like(rest[4]))


def test_opcheck_of_some_gradients():
    arguments = backward_arguments("teacher", Options())
    opcheck(BACKWARD.default, arguments, {"output_mask": [False, True, True]})


@pytest.mark.parametrize("position", range(3, 6), ids=Operands._fields[3:6])
def test_constants_that_ask_for_a_gradient_are_refused(position):
    """By the operator; the public functions detach them."""
    arguments = [*forward_arguments("teacher_lse", Options())]
    arguments[position].requires_grad_()
    with pytest.raises(ValueError, match=f"{Operands._fields[position]} requires grad"):
        FORWARD(*arguments)


def test_the_operator_under_torch_func():
    """At any level: the gradient by one argument inside of that by another."""
    arguments = forward_arguments("teacher", Options())

    def loss(query: Tensor, key: Tensor) -> Tensor:
        output, kl, *_ = FORWARD(query, key, *arguments[2:])
        return output.square().sum() + kl.sum()

    query, key = (tensor.clone().requires_grad_() for tensor in arguments[:2])
    expected = torch.autograd.grad(loss(query, key), (query, key))
    actual = torch.func.grad(loss, argnums=(0, 1))(*arguments[:2])
    for grad, wanted in zip(actual, expected, strict=True):
        assert torch.equal(grad, wanted)


@every_mode
def test_results_that_are_out_of_reach(monkeypatch, options):
    """The output, and a gradient laid out as a view is, where rows 5 elements apart are too far."""
    arguments = {
        FORWARD: forward_arguments("views", options),
        BACKWARD: backward_arguments("views", options),
    }
    expected = [operator(*inputs) for operator, inputs in arguments.items()]
    monkeypatch.setattr(triton_layouts, "FARTHEST_ROW", 5)
    monkeypatch.setattr(triton_problem, "_facts", triton_problem._facts.__wrapped__)
    actual = [operator(*inputs) for operator, inputs in arguments.items()]
    assert actual[0][0].stride(2) >= 5 and actual[1][0].stride(2) >= 5
    for result, wanted in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert torch.equal(result, wanted) and result.stride() == wanted.stride()


@pytest.mark.parametrize("options", [MODES["one pass"], MODES["head averages"]], ids=["", "mean"])
@pytest.mark.parametrize("dim", range(3), ids=["batch", "heads", "length"])
def test_offsets_beyond_32_bits(tmp_path, dim, options):
    """Of all that is [B, H, L, width]: operands, output and what arrives at it; of the mask too."""
    inputs = backward_arguments("key padding", options)
    *tensors, row_state = inputs[:13]
    far = [
        x if x is None or x.dim() < 4 else far_apart(x, dim, tmp_path / str(position))
        for position, x in enumerate(tensors)
    ]
    for actual, expected in zip(
        BACKWARD(*far, row_state, *options), BACKWARD(*inputs), strict=True
    ):
        assert torch.equal(actual, expected)


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


def printed_by(program: str) -> list[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_tensors_of_the_cpu_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    by_function, by_operator = printed_by(REFUSED)
    assert "backend='triton' cannot run here" in by_function
    assert "TRITON_INTERPRET=1" in by_operator


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, attn_kd
from attn_kd.ops import triton_operator
q = torch.empty(1, 1, 4, 8, device="meta")
try:
    triton_operator.forward(q, q, q, *[None] * 7, "reverse_kl", "none", 0.0)
except attn_kd.InputError as error:
    print(error)
"""


def test_the_operator_without_triton():
    (message,) = printed_by(WITHOUT_TRITON)
    assert "Triton cannot be imported" in message
