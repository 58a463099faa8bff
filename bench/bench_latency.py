"""Microseconds per call where the arithmetic takes hardly any: what calling an operator costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.accuracy import Checker, Errors
from bench.devices import clock_for
from bench.gpu_peers import candidates_on, split_refused
from bench.peers import CANDIDATES, PASSES, Candidate, forward
from bench.rounds import measure_in_turn
from bench.workloads import Shape, Workload, make_workload

SMALL = {
    "16x16": Shape(1, 1, 16, 16, 32),
    "1x1064": Shape(1, 8, 1, 1064, 32),  # cross-attention of a DETR with one object query
    "1x1064-one-head": Shape(1, 1, 1, 1064, 32),
    "paper-b1": Shape(1, 8, 169, 169, 32),
}
CALLS = 50  # in a row, for one time
HEADS = 17  # of the larger problem that tells arithmetic from overhead


def recorded_forward(candidate: Candidate, workload: Workload) -> object:
    """Output and divergence, with what a backward would need: as in training."""
    return candidate(*workload.inputs)


PASSES_OF_CALLS: dict[str, Callable[[Candidate, Workload], object]] = {
    "forward": forward,
    "forward, recorded": recorded_forward,
    **PASSES,
}


@pytest.mark.parametrize("pass_name", PASSES_OF_CALLS)
@pytest.mark.parametrize("shape_name", SMALL)
def test_latency(
    benchmark: BenchmarkFixture,
    budget: float,
    device: torch.device,
    shape_name: str,
    pass_name: str,
) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    workload = make_workload(SMALL[shape_name], dtype, device=device)
    run, checker = PASSES_OF_CALLS[pass_name], Checker(workload)
    functions, refused = split_refused(
        {name: partial(run, f, workload) for name, f in candidates_on(device).items()}
    )
    errors = Errors()
    benchmark.extra_info.update(
        {"kind": "latency", "shape": shape_name, "pass": pass_name},
        dtype=str(dtype).removeprefix("torch."),
        sizes=workload.shape._asdict(),
        errors=errors,
        refused=refused,
    )
    measure_in_turn(
        benchmark,
        functions,
        budget=budget / 3,
        calls=CALLS,
        verify=lambda name, result: errors.update({name: checker.check(result)}),
        clock=clock_for(device, calls=CALLS),
    )


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("pass_name", PASSES_OF_CALLS)
def test_overhead(benchmark: BenchmarkFixture, budget: float, pass_name: str, threads: int) -> None:
    """A call of one head of 16 × 16 beside one of 17 such heads, on one thread.

    The 16 further heads are arithmetic alone, so a sixteenth of the difference is what one head's
    arithmetic takes, and the rest of the small call is its overhead: Python, dispatch, autograd,
    allocation.
    """
    one_head = Shape(1, 1, 16, 16, 32)
    run, functions = PASSES_OF_CALLS[pass_name], {}
    for suffix, shape in (("", one_head), (f", {HEADS} heads", one_head._replace(H=HEADS))):
        workload = make_workload(shape, torch.float32)
        for name in ("sdpa", "attn_kd", "attn_kd.attention"):
            functions[name + suffix] = partial(run, CANDIDATES[name], workload)
    benchmark.extra_info.update(
        {"kind": "overhead", "shape": "16x16", "pass": pass_name, "dtype": "float32"},
        sizes={**one_head._asdict(), "heads": HEADS},
        threads=threads,
    )
    measure_in_turn(benchmark, functions, budget=budget / 3, calls=CALLS)
