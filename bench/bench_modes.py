"""The operator's modes beside its default: the divergence KL(student ‖ teacher) of every head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import attn_kd
from bench.accuracy import TOLERANCES
from bench.devices import clock_for
from bench.rounds import SUBJECT, measure_in_turn
from bench.workloads import SHAPES, Shape, Workload, make_workload

CHECKED = Shape(1, 8, 300, 300, 32)  # small enough for all maps in float64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEED = 0  # of the dropout that is compared with the reference


class Mode(NamedTuple):
    """A function of the library, with options."""

    function: Callable[..., Any]
    options: dict[str, str | float]

    def __call__(self, workload: Workload, **backend: str) -> tuple[Tensor, ...]:
        """What the function returns, divergence and output as far as it has them."""
        w, alone = workload, self.function is attn_kd.attention_kl_div
        teacher = (w.teacher_query, w.teacher_key)
        inputs = (w.query, w.key, *(() if alone else (w.value,)), *teacher)
        result = self.function(*inputs, teacher_lse=w.teacher_lse, **self.options, **backend)
        return (result.kl,) if alone else (result.kl, result.output)


MODES = {
    SUBJECT: Mode(attn_kd.attention_kl, {}),
    "forward_kl": Mode(attn_kd.attention_kl, {"divergence": "forward_kl"}),
    "js": Mode(attn_kd.attention_kl, {"divergence": "js"}),
    "mse": Mode(attn_kd.attention_kl, {"divergence": "mse"}),
    "head mean": Mode(attn_kd.attention_kl, {"head_reduction": "mean"}),
    **{
        f"head mean, {name}": Mode(
            attn_kd.attention_kl, {"head_reduction": "mean", "divergence": name}
        )
        for name in ("forward_kl", "js", "mse")
    },
    "dropout 0.1": Mode(attn_kd.attention_kl, {"dropout_p": 0.1}),
    "attention_kl_div": Mode(attn_kd.attention_kl_div, {}),
}
# What is measured at each shape: all of them where that is quick.
MEASURED = {"coco": tuple(MODES), "dc5": (SUBJECT, "attention_kl_div")}


def forward(mode: Mode, workload: Workload, **backend: str) -> tuple[Tensor, ...]:
    """Divergence and output, nothing saved for a backward."""
    with torch.no_grad():
        return mode(workload, **backend)


def forward_backward(mode: Mode, workload: Workload, **backend: str) -> tuple[Tensor, ...]:
    """Divergence, output, and the gradients of query, key and value."""
    results = mode(workload, **backend)
    kl = results[0]
    grad_kl = workload.grad_kl if kl.dim() == 3 else workload.grad_kl[:, 0]  # head mean: [B, Lq]
    gradients = (grad_kl.to(kl.dtype), workload.grad_output)[: len(results)]
    leaves = (workload.query, workload.key, workload.value)[: len(results) + 1]
    return (*results, *torch.autograd.grad(results, leaves, gradients))


PASSES = {"forward": forward, "forward+backward": forward_backward}


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("shape_name", MEASURED)
def test_modes(
    benchmark: BenchmarkFixture,
    budget: float,
    device: torch.device,
    shape_name: str,
    dtype_name: str,
    pass_name: str,
) -> None:
    dtype = DTYPES[dtype_name]
    workload = make_workload(SHAPES[shape_name], dtype, device=device)
    modes = {name: MODES[name] for name in MEASURED[shape_name]}
    run = PASSES[pass_name]
    benchmark.extra_info.update(
        {"kind": "modes", "shape": shape_name, "pass": pass_name},
        dtype=dtype_name,
        sizes=SHAPES[shape_name]._asdict(),
    )
    for mode in modes.values():
        check(mode, dtype=dtype, device=device)
    functions = {name: partial(run, mode, workload) for name, mode in modes.items()}
    measure_in_turn(benchmark, functions, budget=budget, clock=clock_for(device))


def check(
    mode: Mode,
    shape: Shape = CHECKED,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Compare values and gradients with the reference backend in float64, dropout included.

    Raises:
        AssertionError: one is further off than rounding explains.
    """
    results = []
    for precision, backend in ((dtype, {}), (torch.float64, {"backend": "reference"})):
        torch.manual_seed(SEED)
        workload = make_workload(shape, dtype, device=device)
        if precision == torch.float64:  # of the same numbers, with the same log-sum-exp
            workload = workload.to(precision)
        results.append(forward_backward(mode, workload, **backend))
    for x, y in zip(*results, strict=True):
        error = ((x.double() - y).norm() / y.norm()).item()
        assert error <= TOLERANCES[dtype], f"{mode.options}: {error:.1e} off"
