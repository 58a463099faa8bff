"""Small layers replayed from a CUDA graph: what remains of a call without Python and launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.accuracy import Checker, Errors
from bench.devices import clock_for
from bench.gpu_peers import GPU_CANDIDATES, split_refused
from bench.peers import PASSES
from bench.rounds import measure_in_turn
from bench.workloads import SHAPES, make_workload

pytestmark = pytest.mark.gpu
REPLAYS = 50  # in a row, for one time
WARM_UP = 3  # calls before a capture, which must meet nothing for the first time


class Replay:
    """A call captured in a CUDA graph; calling this replays it and returns the same tensors."""

    def __init__(self, function: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function()

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("shape_name", ["paper", "cross"])
def test_replay(
    benchmark: BenchmarkFixture,
    budget: float,
    device: torch.device,
    shape_name: str,
    pass_name: str,
) -> None:
    workload = make_workload(SHAPES[shape_name], torch.bfloat16, device=device)
    checker, errors = Checker(workload), Errors()
    functions, refused = split_refused(
        {name: partial(PASSES[pass_name], f, workload) for name, f in GPU_CANDIDATES.items()}
    )
    benchmark.extra_info.update(
        {"kind": "graph", "shape": shape_name, "pass": pass_name, "dtype": "bfloat16"},
        sizes=SHAPES[shape_name]._asdict(),
        errors=errors,
        refused=refused,
    )
    measure_in_turn(
        benchmark,
        {name: Replay(function) for name, function in functions.items()},
        budget=budget / 3,
        calls=REPLAYS,
        verify=lambda name, result: errors.update({name: checker.check(result)}),
        clock=clock_for(device),
    )
