"""What is compared on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench.bench_attention_kl import candidates_for
from bench.gpu_peers import (
    GPU_CANDIDATES,
    PINNED_SDPA,
    candidates_on,
    pinned_sdpa,
    refusal,
    split_refused,
)
from bench.measurements import with_yardstick
from bench.peers import CANDIDATES, forward, forward_backward
from bench.workloads import SHAPES, Shape, make_workload

SHAPE = Shape(B=1, H=2, Lq=5, Lk=7, D=8)
GPU = torch.device("cuda")


def test_on_a_gpu_every_attention_of_torch_has_a_name_and_sdpa_is_none():
    names = candidates_on(GPU).keys()
    assert names - CANDIDATES.keys() == {*PINNED_SDPA, "attn_kd cuda"}
    assert CANDIDATES.keys() - names == {"sdpa"}


def test_a_pinned_attention_is_attention():
    workload = make_workload(SHAPE, torch.float32)
    pinned = partial(pinned_sdpa, SDPBackend.MATH)
    for found, expected in zip(
        forward_backward(pinned, workload),
        forward_backward(CANDIDATES["sdpa"], workload),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_an_attention_that_does_not_run_here_is_refused_with_a_reason():
    workload = make_workload(SHAPE, torch.float32)
    functions = {
        name: partial(forward, GPU_CANDIDATES[name], workload)
        for name in ("sdpa cudnn", "attn_kd cuda", "attn_kd")
    }
    running, refused = split_refused(functions)
    assert list(running) == ["attn_kd"]
    assert "No viable backend" in refused["sdpa cudnn"]
    assert "backend='cuda' cannot run here" in refused["attn_kd cuda"]


def test_another_failure_is_no_refusal():
    with pytest.raises(RuntimeError, match="must match"):
        refusal(lambda: torch.ones(2) + torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["sdpa_identity", *PINNED_SDPA])
def test_a_gpus_operators_are_called_with_what_they_take(name, dtype):
    # On "meta" tensors operators check their arguments and compute shapes alone.
    workload = make_workload(SHAPE, dtype, device="meta")
    output, kl, *gradients = forward_backward(GPU_CANDIDATES[name], workload)
    assert output.shape == workload.query.shape
    assert (None if kl is None else kl.shape) == (SHAPE[:3] if name == "sdpa_identity" else None)
    expected = [workload.query, workload.key, workload.value]
    assert [x.shape for x in gradients] == [x.shape for x in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_maps_are_stored_at_video(dtype):
    names = candidates_for(SHAPES["video"], dtype, GPU)
    assert names == [*PINNED_SDPA, "attn_kd", "attn_kd cuda", "sdpa_identity"]


def test_the_yardstick_is_the_fastest_pinned_attention_by_its_median():
    seconds = {"sdpa flash": [3.0, 1.0, 2.9], "sdpa cudnn": [2.0, 2.0, 9.0], "attn_kd": [1.0]}
    assert with_yardstick(seconds)["sdpa"] == seconds["sdpa cudnn"]


@pytest.mark.parametrize("seconds", [{"sdpa": [1.0]}, {"none": [1.0]}], ids=list)
def test_no_yardstick_is_made_where_there_is_one_or_nothing_to_make_it_of(seconds):
    assert with_yardstick(seconds) == seconds
