"""No attention map is stored: neither between the passes nor within one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import attn_kd
from attn_kd.ops import reference
from tests.ops.cases import DIVERGENCES, Sizes, random_cotangents, random_inputs, run_backend
from tests.ops.live_memory import LiveMemory

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
by_kernels = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)


def bytes_saved(sizes: Sizes, backend: str, **options) -> int:
    """What autograd keeps for the backward pass beyond the five inputs."""
    inputs = random_inputs(sizes)
    student = [tensor.requires_grad_() for tensor in inputs[:3]]
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attn_kd.attention_kl(*student, *inputs[3:], backend=backend, **options)
    assert out.kl.requires_grad
    return sum(saved.values())


@every_divergence
@by_kernels
def test_saved_beyond_the_inputs_is_the_output_and_four_numbers_a_row(backend, divergence):
    sizes = Sizes(B=1, H=2, Lq=300, Lk=400, D=8, Dv=8, Dt=8)
    rows = sizes.B * sizes.H * sizes.Lq
    saved = bytes_saved(sizes, backend, divergence=divergence)
    assert saved == 4 * rows * (sizes.Dv + 4)  # output; row_state, teacher_lse


@by_kernels
def test_saved_does_not_grow_with_an_expanded_mask(backend):
    sizes = Sizes(B=1, H=2, Lq=300, Lk=400, D=8, Dv=8, Dt=8)
    mask = torch.zeros(1, 1, 1, sizes.Lk)
    with_mask = bytes_saved(sizes, backend, attn_mask=mask)
    assert with_mask - bytes_saved(sizes, backend) == mask.untyped_storage().nbytes()


@every_divergence
def test_reference_holds_blocks_of_the_map_alone(monkeypatch, divergence):
    sizes = Sizes(B=1, H=2, Lq=400, Lk=500, D=4, Dv=4, Dt=4)
    whole_map = 4 * sizes.B * sizes.H * sizes.Lq * sizes.Lk
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 10 * sizes.H * sizes.Lk)  # 10 rows of 400
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    with LiveMemory() as memory:
        run_backend("reference", inputs, cotangents, divergence=divergence)
    # A block's backward holds about a dozen tiles of 1/40 of a map; eager code holds six maps.
    assert memory.peak < 0.6 * whole_map


PEAK = """
import resource, sys, torch, attn_kd
q, k, v, tq, tk = [torch.randn(1, 8, 4200, 32, requires_grad=i < 3) for i in range(5)]

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "sdpa":
    torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
else:
    out = attn_kd.attention_kl(q, k, v, tq, tk, backend="cpu")
    (out.output.sum() + out.kl.mean()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_peak_at_4200_tokens_is_that_of_plain_sdpa(cpu_backend):
    def peak_kib(what: str) -> int:
        result = subprocess.run(
            [sys.executable, "-c", PEAK, what], capture_output=True, text=True, check=True
        )
        return int(result.stdout)

    stored_map = 8 * 4200 * 4200 * 4 / 1024
    assert peak_kib("attn_kd") - peak_kib("sdpa") < 0.02 * stored_map
