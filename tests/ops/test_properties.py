"""Property-based: any shapes, layouts, masks and options agree with the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import explicit
from tests.ops.cases import (
    DIVERGENCES,
    HEAD_REDUCTIONS,
    Cotangents,
    Inputs,
    Sizes,
    assert_as_accurate_as_eager,
    random_cotangents,
    random_inputs,
    run_backend,
)
from tests.ops.conftest import require_backend
from tests.ops.layouts import LAYOUTS

sizes = st.builds(
    Sizes,
    B=st.integers(1, 3),
    H=st.integers(1, 4),
    Lq=st.integers(1, 140),
    Lk=st.integers(1, 210),
    D=st.integers(1, 40),
    Dv=st.integers(1, 40),
    Dt=st.integers(1, 40),
    Ht=st.just(0),
    G=st.sampled_from([1, 1, 2, 5]),
)


def draw_mask(data: st.DataObject, sizes: Sizes) -> Tensor | None:
    kind = data.draw(st.sampled_from(["none", "bool", "additive", "additive with -inf"]))
    if kind == "none":
        return None
    full = (sizes.B, sizes.H, sizes.Lq, sizes.Lk)
    first = data.draw(st.integers(0, 3), label="dimensions left out")
    shape = [n if data.draw(st.booleans()) else 1 for n in full[first:]]
    visible = torch.rand(shape) < data.draw(st.sampled_from([0.05, 0.5, 0.95]))
    if kind == "bool":
        return visible
    mask = torch.randn(shape)
    return mask if kind == "additive" else mask.masked_fill(~visible, -torch.inf)


def draw_options(data: st.DataObject, inputs: Inputs, sizes: Sizes) -> dict[str, Any]:
    scales = st.none() | st.floats(-1.5, 1.5)
    options = {
        "attn_mask": draw_mask(data, sizes),
        "scale": data.draw(scales),
        "teacher_scale": data.draw(scales),
        "divergence": data.draw(st.sampled_from(DIVERGENCES)),
        "head_reduction": data.draw(st.sampled_from(HEAD_REDUCTIONS)),
    }
    if sizes.G == 1 and data.draw(st.booleans(), label="given teacher_lse"):
        mask = options["attn_mask"]
        if mask is not None and mask.is_floating_point():
            mask = mask.double()
        lse = explicit.teacher_lse(
            *inputs.to(torch.float64)[3:],
            attn_mask=mask,
            teacher_scale=options["teacher_scale"],
        )
        options["teacher_lse"] = lse.to(inputs.query.dtype)
    return options


def draw_cotangents(
    data: st.DataObject, sizes: Sizes, dtype: torch.dtype, head_reduction: str
) -> Cotangents:
    names = data.draw(st.sets(st.sampled_from(Cotangents._fields), min_size=1))
    return random_cotangents(sizes, dtype, head_reduction).only(*names)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@settings(max_examples=60)
@given(data=st.data(), sizes=sizes, seed=st.integers(0, 2**31))
def test_agrees_with_the_definition(backend_name, data, sizes, seed):
    require_backend(backend_name)
    # A gradient of a few numbers, each a sum that cancels: eager's error is chance then.
    assume(sizes.B * sizes.H * sizes.Lq * sizes.D >= 8)
    torch.manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    inputs = random_inputs(sizes, dtype)
    inputs = Inputs(*(data.draw(st.sampled_from(LAYOUTS))(tensor) for tensor in inputs))
    options = draw_options(data, inputs, sizes)
    cotangents = draw_cotangents(data, sizes, dtype, options["head_reduction"])
    actual = run_backend(backend_name, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)
