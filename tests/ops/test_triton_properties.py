"""The Triton kernels against the definition, over sizes, layouts, masks and options at random."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import assume, given, settings

from tests.conftest import HAS_GPU
from tests.ops.cases import Inputs, Sizes, assert_as_accurate_as_eager, random_inputs, run_backend
from tests.ops.conftest import require_backend
from tests.ops.layouts import LAYOUTS
from tests.ops.test_properties import draw_cotangents, draw_options

# Of no more than two tiles each way, and two heads: Triton is interpreted where there is no GPU.
few_sizes = st.builds(
    Sizes,
    B=st.just(1),
    H=st.integers(1, 2),
    Lq=st.integers(1, 80),
    Lk=st.integers(1, 140),
    D=st.integers(1, 40),
    Dv=st.integers(1, 40),
    Dt=st.integers(1, 40),
    Ht=st.just(0),
    G=st.sampled_from([1, 1, 3]),
)


@settings(max_examples=25)
@given(data=st.data(), sizes=few_sizes, seed=st.integers(0, 2**31))
def test_triton_agrees_with_the_definition(data, sizes, seed):
    with torch.device("cuda" if HAS_GPU else "cpu"), np.errstate(all="ignore"):
        check(data, sizes, seed)


def check(data: st.DataObject, sizes: Sizes, seed: int) -> None:
    require_backend("triton")
    # A gradient of a few numbers, each a sum that cancels: eager's error is chance then.
    assume(sizes.B * sizes.H * sizes.Lq * sizes.D >= 8)
    torch.manual_seed(seed)
    inputs = random_inputs(sizes, data.draw(st.sampled_from([torch.float32])))
    inputs = Inputs(*(data.draw(st.sampled_from(LAYOUTS))(tensor) for tensor in inputs))
    options = draw_options(data, inputs, sizes)
    cotangents = draw_cotangents(data, sizes, torch.float32, options["head_reduction"])
    actual = run_backend("triton", inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)
