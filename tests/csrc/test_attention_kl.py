"""The split of the work over threads: key ranges whose partial sums are added afterwards."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import (
    DIVERGENCES,
    Sizes,
    assert_as_accurate_as_eager,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

pytestmark = pytest.mark.usefixtures("module")

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("threads", [2, 5], indirect=True, ids=lambda n: f"{n} threads")
@pytest.mark.parametrize("Lk", [191, 192, 1100])
def test_keys_split_between_threads(Lk, threads, dtype, divergence):
    """One head: the backward pass gives each thread a range of the keys."""
    sizes = Sizes(B=1, H=1, Lq=70, Lk=Lk)
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype)
    actual = run_backend("cpu", inputs, cotangents, divergence=divergence)
    assert_as_accurate_as_eager(actual, inputs, cotangents, divergence=divergence)


@every_divergence
@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.usefixtures("exact_products")
def test_split_sums_are_rounded_once(threads, dtype, divergence):
    sizes = Sizes(B=1, H=1, Lq=40, Lk=400)
    inputs = random_inputs(sizes, dtype)
    cotangents = random_cotangents(sizes, dtype).only("kl")
    split = run_backend("cpu", inputs, cotangents, divergence=divergence)["grad_query"]
    wide = inputs.to(torch.float32)
    expected = run_backend("cpu", wide, cotangents, divergence=divergence)["grad_query"]
    torch.testing.assert_close(split, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@every_divergence
@pytest.mark.parametrize("threads", [2, 5], indirect=True, ids=lambda n: f"{n} threads")
@pytest.mark.parametrize("Lk", [191, 1100])
def test_keys_of_averaged_maps_split_between_threads(Lk, threads, divergence):
    sizes = Sizes(B=1, H=2, Lq=70, Lk=Lk, Ht=3)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes, head_reduction="mean")
    options = {"divergence": divergence, "head_reduction": "mean"}
    actual = run_backend("cpu", inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)
