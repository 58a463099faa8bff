"""Sums over thousands of keys, in as many tiles as a GPU has of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from attn_kd.kernels.triton import configurations
from tests.conftest import HAS_GPU
from tests.ops import explicit
from tests.ops.cases import (
    Sizes,
    assert_as_accurate_as_eager,
    random_cotangents,
    random_inputs,
    run_backend,
)
from tests.ops.conftest import require_backend


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch) -> Iterator[None]:
    require_backend("triton")
    monkeypatch.setattr(configurations, "INTERPRETED", configurations.Tiling(32, 32, 4, 1))
    with torch.device("cuda" if HAS_GPU else "cpu"), np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_a_given_lse_costs_no_digits(divergence):
    """The sums over the keys then exceed their small difference, the divergence, by far."""
    sizes = Sizes(B=1, H=1, Lq=32, Lk=4200, D=16, Dt=16, Dv=16)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    lse = explicit.teacher_lse(inputs.teacher_query.double(), inputs.teacher_key.double())
    options = {"teacher_lse": lse.float(), "divergence": divergence}
    actual = run_backend("triton", inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, roundings=0, **options)
