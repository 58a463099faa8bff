"""The Triton backend on a GPU: what its interpreter on the CPU cannot show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attn_kd
from tests.ops.cases import Results, Sizes, assert_equal, random_inputs
from tests.ops.conftest import require_backend
from tests.ops.kinds import KINDS, Case, case_of

pytestmark = pytest.mark.gpu

SIZES = Sizes(B=2, H=2, Lq=130, Lk=200, D=32, Dv=32, Dt=32)

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    require_backend("triton")
    with torch.device("cuda"):
        yield


def capture(case: Case) -> tuple[torch.cuda.CUDAGraph, Results, Results]:
    """A step in a graph, what its replays write, and what an eager one has given."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = case.step("triton")  # compiles
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.step("triton")
    return graph, captured, eager


@every_kind
def test_a_training_step_is_captured_and_replayed(kind):
    case = case_of(kind, SIZES, torch.bfloat16)
    graph, captured, first = capture(case)
    case.inputs.query.mul_(2)
    graph.replay()
    expected = case.step("triton")
    if "dropout_p" in case.options:  # of another noise each time, but for these
        captured, expected = ({n: r[n] for n in ("kl", "lse")} for r in (captured, expected))
    assert_equal(captured, expected)
    assert not torch.equal(captured["kl"], first["kl"])


def test_each_replay_draws_new_noise_that_its_two_passes_share():
    """The output is linear in the value, so that what is kept is the same if dO.o = V.dV."""
    case = case_of(KINDS["dropout"], SIZES)
    graph, captured, _ = capture(case)
    outputs = []
    for _ in range(2):
        graph.replay()
        outputs.append(captured["output"].clone())
        by_output = (case.cotangents.output * captured["output"]).double().sum()
        by_value = (case.inputs.value * captured["grad_value"]).double().sum()
        torch.testing.assert_close(by_output, by_value, rtol=1e-4, atol=1e-4)
    assert not torch.equal(*outputs)


@every_kind
def test_nothing_waits_for_the_device(kind):
    case = case_of(kind, SIZES, torch.bfloat16)
    for _ in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.step("triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_need_not_be_that_of_the_tensors():
    inputs = random_inputs(Sizes())
    expected = attn_kd.attention_kl(*inputs, backend="triton")
    there = [tensor.to("cuda:1") for tensor in inputs]
    actual = attn_kd.attention_kl(*there, backend="triton")
    torch.testing.assert_close(actual.kl.to("cuda:0"), expected.kl)
