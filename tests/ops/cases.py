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
DIVERGENCES = tuple(explicit.DIVERGENCES)
HEAD_REDUCTIONS = ("none", "mean")
HEAD_DIMS = (1, 3, 8, 17, 32, 40, 64, 80, 128, 256)
# float dtype -> what kl, lse and all sums are kept in
ACCUMULATION = {dtype: torch.promote_types(dtype, torch.float32) for dtype in DTYPES}

Results = dict[str, Tensor]


class Sizes(NamedTuple):
    """Shapes of one call; the defaults differ from each other wherever they may.

    Ht is the teacher's number of heads, 0 where it is H; G is how many of the teacher's tokens
    belong to a key of the student.
    """

    B: int = 2
    H: int = 3
    Lq: int = 13
    Lk: int = 29
    D: int = 8
    Dv: int = 5
    Dt: int = 11
    Ht: int = 0
    G: int = 1


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
        return "-".join(f"{name}{size}" for name, size in value._asdict().items() if size)
    return None


def random_inputs(
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_dtype: torch.dtype | None = None,
    spread: float = 1.0,
) -> Inputs:
    """Normal tensors; `spread` multiplies the queries, and so the logits."""
    B, H, Lq, Lk, D, Dv, Dt, Ht, G = sizes
    shapes = ((H, Lq, D), (H, Lk, D), (H, Lk, Dv), (Ht or H, Lq, Dt), (Ht or H, G * Lk, Dt))
    query, key, value, teacher_query, teacher_key = (
        torch.randn(B, *shape, dtype=torch.float64) for shape in shapes
    )
    student = (spread * query, key, value)
    teacher = (spread * teacher_query, teacher_key)
    return Inputs(
        *(tensor.to(dtype) for tensor in student),
        *(tensor.to(teacher_dtype or dtype) for tensor in teacher),
    )


def filled(inputs: Inputs, hidden: Tensor, value: float) -> Inputs:
    """The inputs with `value` all over the hidden keys; `hidden` is [B or 1, H or 1, 1, Lk]."""
    hidden = hidden.transpose(-1, -2)
    names = ("key", "value", "teacher_key")
    return inputs._replace(**{n: getattr(inputs, n).masked_fill(hidden, value) for n in names})


def random_cotangents(
    sizes: Sizes, dtype: torch.dtype = torch.float32, head_reduction: str = "none"
) -> Cotangents:
    """Normal cotangents whose values are exact in the dtypes that the operator returns."""
    B, H, Lq, Dv = sizes.B, sizes.H, sizes.Lq, sizes.Dv
    kl_shape = (B, Lq) if head_reduction == "mean" else (B, H, Lq)
    return Cotangents(
        torch.randn(B, H, Lq, Dv, dtype=torch.float64).to(dtype),
        torch.randn(kl_shape, dtype=torch.float64).to(dtype),
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
    """The options with all floating tensors, such as an additive mask, in float64."""
    return {
        name: option.double() if torch.is_tensor(option) and option.is_floating_point() else option
        for name, option in options.items()
    }


def assert_as_accurate_as_eager(
    actual: Results,
    inputs: Inputs,
    cotangents: Cotangents,
    *,
    roundings: float | None = None,
    **options: Any,
) -> None:
    """`assert_accurate` against the definition in float64 and, as eager code, in the own dtype."""
    truth = truth_of(inputs, cotangents, **options)
    eager = run(explicit.attention_kl, inputs, cotangents, **options)
    assert_accurate(actual, eager, truth, roundings)


def assert_accurate(
    actual: Results, eager: Results, truth: Results, roundings: float | None = None
) -> None:
    """Every tensor's error is at most twice eager's, plus a few roundings of the tensor itself.

    Errors are Frobenius norms over a tensor: which element of a tensor is hit hardest, and how
    hard, is chance, so that the largest errors of two equally good sums differ by a factor of 4.
    The roundings matter where a tensor has few elements or sums few terms, and eager's error is
    small by chance; at the sizes of a vision encoder none are needed (`roundings=0`). Without an
    argument they are 4 in float32 and 64 in float64, where eager is the truth and sets no bar.
    """
    for name, result in actual.items():
        expected = truth[name]
        finite = expected.isfinite()
        assert torch.equal(result.isfinite(), finite), name
        assert torch.equal(result[~finite].double(), expected[~finite]), name
        error = norm(result.double() - expected)
        eager_error = norm(eager[name].double() - expected)
        wide = torch.promote_types(result.dtype, torch.float32)
        allowed = (64 if wide == torch.float64 else 4) if roundings is None else roundings
        bound = 2 * eager_error + allowed * torch.finfo(wide).eps * magnitude(expected)
        assert error <= bound, (
            f"{name}: error {error:.2e} exceeds {bound:.2e}, eager's is {eager_error:.2e}"
        )


def norm(x: Tensor) -> float:
    """The Frobenius norm of the finite elements."""
    return x[x.isfinite()].double().norm().item()


def magnitude(x: Tensor) -> float:
    """The Frobenius norm; that of ones where terms of size 1 cancel, as they do with one key."""
    ones = x.numel() ** 0.5
    return norm(x) if norm(x) > 1e-5 * ones else ones


def largest(x: Tensor) -> float:
    """The largest finite magnitude in x; 0 where there is none."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_equal(actual: Results, expected: Results) -> None:
    """Bit for bit."""
    for name, tensor in expected.items():
        same = torch.equal(actual[name].nan_to_num(), tensor.nan_to_num())
        assert same and torch.equal(actual[name].isnan(), tensor.isnan()), name
