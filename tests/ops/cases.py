"""What the operator's tests share: sizes, random inputs, a run with gradients, the error bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attn_kd
from tests.ops import explicit

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIVERGENCES = ("reverse_kl", "forward_kl")
HEAD_DIMS = (1, 3, 8, 17, 32, 40, 64, 80, 128, 256)
# float dtype -> what kl, lse and all sums are kept in
ACCUMULATION = {dtype: torch.promote_types(dtype, torch.float32) for dtype in DTYPES}

Results = dict[str, Tensor]


class Sizes(NamedTuple):
    """Shapes of one call; the defaults differ from each other wherever they may."""

    B: int = 2
    H: int = 3
    Lq: int = 13
    Lk: int = 29
    D: int = 8
    Dv: int = 5
    Dt: int = 11


class Inputs(NamedTuple):
    """The five tensors of a call."""

    query: Tensor
    key: Tensor
    value: Tensor
    teacher_query: Tensor
    teacher_key: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(tensor.to(dtype) for tensor in self))


class Cotangents(NamedTuple):
    """The gradients that arrive at what a call returns; None where nothing depends on it."""

    output: Tensor | None
    kl: Tensor | None
    lse: Tensor | None

    def only(self, *names: str) -> Cotangents:
        return Cotangents(*(t if n in names else None for n, t in self._asdict().items()))


def name_of(value: object) -> str | None:
    """The readable id of a parameter."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Sizes):
        return "-".join(f"{name}{size}" for name, size in value._asdict().items())
    return None


def random_inputs(
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_dtype: torch.dtype | None = None,
    spread: float = 1.0,
) -> Inputs:
    """Normal tensors; `spread` multiplies the queries, and so the logits."""
    B, H, Lq, Lk, D, Dv, Dt = sizes
    shapes = ((Lq, D), (Lk, D), (Lk, Dv), (Lq, Dt), (Lk, Dt))
    query, key, value, teacher_query, teacher_key = (
        torch.randn(B, H, *shape, dtype=torch.float64) for shape in shapes
    )
    student = (spread * query, key, value)
    teacher = (spread * teacher_query, teacher_key)
    return Inputs(
        *(tensor.to(dtype) for tensor in student),
        *(tensor.to(teacher_dtype or dtype) for tensor in teacher),
    )


def random_cotangents(sizes: Sizes, dtype: torch.dtype = torch.float32) -> Cotangents:
    """Normal cotangents whose values are exact in the dtypes that the operator returns."""
    B, H, Lq, _, _, Dv, _ = sizes
    return Cotangents(
        torch.randn(B, H, Lq, Dv, dtype=torch.float64).to(dtype),
        torch.randn(B, H, Lq, dtype=torch.float64).to(dtype),
        torch.randn(B, H, Lq, dtype=torch.float64).to(dtype),
    )


def run(function: Callable, inputs: Inputs, cotangents: Cotangents, **options: Any) -> Results:
    """Call `function`; return its results and, as grad_*, the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    results = dict(
        zip(("output", "kl", "lse"), function(*leaves, *inputs[3:], **options), strict=True)
    )
    pairs = [(results[n], c) for n, c in cotangents._asdict().items() if c is not None]
    grads = torch.autograd.grad(
        [result for result, _ in pairs],
        leaves,
        [cotangent.to(result.dtype) for result, cotangent in pairs],
        materialize_grads=True,
    )
    names = ("grad_query", "grad_key", "grad_value")
    results |= dict(zip(names, grads, strict=True))
    return {name: result.detach() for name, result in results.items()}


def run_backend(
    backend: str | None, inputs: Inputs, cotangents: Cotangents, **options: Any
) -> Results:
    """`run` of attn_kd.attention_kl."""
    return run(partial(attn_kd.attention_kl, backend=backend), inputs, cotangents, **options)


def truth_of(inputs: Inputs, cotangents: Cotangents, **options: Any) -> Results:
    """`run` of the definition in float64."""
    double = Cotangents(*(None if c is None else c.double() for c in cotangents))
    return run(explicit.attention_kl, inputs.to(torch.float64), double, **in_double(options))


def in_double(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a floating mask in float64 and without the teacher's LSE."""
    options = {name: option for name, option in options.items() if name != "teacher_lse"}
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.double()
    return options


def assert_as_accurate_as_eager(
    actual: Results, inputs: Inputs, cotangents: Cotangents, **options: Any
) -> None:
    """Every error is at most twice that of eager code in the same dtype, or a few roundings.

    For float64 the definition in float64 is the truth, and only the roundings remain.
    """
    truth = truth_of(inputs, cotangents, **options)
    floor = rounding_floor(truth, inputs, **options)
    options.pop("teacher_lse", None)
    eager = run(explicit.attention_kl, inputs, cotangents, **options)
    for name, expected in truth.items():
        finite = expected.isfinite()
        assert torch.equal(actual[name].isfinite(), finite), name
        assert torch.equal(actual[name][~finite].double(), expected[~finite]), name
        error = largest(actual[name].double() - expected)
        eager_error = largest(eager[name].double() - expected)
        bound = 2 * eager_error + roundings(actual[name].dtype) * floor[name]
        assert error <= bound, (
            f"{name}: error {error:.2e} exceeds {bound:.2e}, eager's is {eager_error:.2e}"
        )


def rounding_floor(truth: Results, inputs: Inputs, **options: Any) -> dict[str, float]:
    """What one relative rounding amounts to in each result.

    Probabilities come from differences of logits and LSEs, and a divergence from a difference of
    LSEs, so that the rounding of an LSE of 8 makes a relative error of 8 roundings.
    """
    options = {name: in_double(options).get(name) for name in ("attn_mask", "teacher_scale")}
    teacher = explicit.teacher_lse(*inputs.to(torch.float64)[3:], **options)
    lse = max(1.0, largest(truth["lse"]), largest(teacher))
    sizes = {name: max(1.0, largest(result)) for name, result in truth.items()}
    return {name: size if name == "lse" else size * lse for name, size in sizes.items()}


def largest(x: Tensor) -> float:
    """The largest finite magnitude in x; 0 where there is none."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def roundings(dtype: torch.dtype) -> float:
    """A few units in the last place; sums in float64 have no eager error to be compared with."""
    return (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps


def assert_equal(actual: Results, expected: Results) -> None:
    """Bit for bit."""
    for name, tensor in expected.items():
        same = torch.equal(actual[name].nan_to_num(), tensor.nan_to_num())
        assert same and torch.equal(actual[name].isnan(), tensor.isnan()), name
