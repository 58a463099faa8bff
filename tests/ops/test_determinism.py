"""The same call gives the same bits, every time and whatever the number of threads."""

from __future__ import annotations

import pytest
import torch

import attn_kd
from tests.ops.cases import (
    DIVERGENCES,
    Sizes,
    assert_equal,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

# one head: the backward pass splits the keys between threads, whose sums must be added in order
ONE_HEAD = Sizes(B=1, H=1, Lq=130, Lk=600)
# few rows: the forward pass splits the keys too, into ranges whatever the number of threads; heads
# so wide that it is worth several threads
ONE_QUERY = Sizes(B=1, H=2, Lq=1, Lk=1100, D=32, Dv=32, Dt=32)
SIZES = {
    "one head": ONE_HEAD,
    "several heads": Sizes(Lq=130, Lk=200),
    "one query": ONE_QUERY,
}

every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
by_kernels = pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)


@by_kernels
@every_size
@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_repeated_calls(backend, sizes, dtype, divergence, threads):
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype)
    first = run_backend(backend, inputs, cotangents, divergence=divergence)
    for _ in range(3):
        again = run_backend(backend, inputs, cotangents, divergence=divergence)
        assert_equal(again, first)


@every_size
@every_divergence
def test_forward_does_not_depend_on_the_number_of_threads(cpu_backend, sizes, divergence):
    inputs = random_inputs(sizes)

    def results(count: int) -> dict[str, torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            out = attn_kd.attention_kl(*inputs, divergence=divergence, backend=cpu_backend)
        finally:
            torch.set_num_threads(before)
        return out._asdict()

    one = results(1)
    for count in (2, 3, 7):
        assert_equal(results(count), one)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_a_row_does_not_depend_on_its_neighbours(cpu_backend, dtype, divergence):
    inputs = random_inputs(ONE_HEAD, dtype)
    whole = attn_kd.attention_kl(*inputs, divergence=divergence, backend=cpu_backend)
    for first, end in ((0, 1), (63, 64), (64, 65), (129, 130), (62, 65), (10, 18)):
        some = inputs._replace(
            query=inputs.query[:, :, first:end], teacher_query=inputs.teacher_query[:, :, first:end]
        )
        alone = attn_kd.attention_kl(*some, divergence=divergence, backend=cpu_backend)
        assert_equal(alone._asdict(), {n: t[:, :, first:end] for n, t in whole._asdict().items()})
