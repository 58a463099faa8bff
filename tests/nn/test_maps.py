"""The open attention map agrees with the operator, hidden keys and blind queries included."""

from __future__ import annotations

import pytest
import torch

from attn_kd import attention
from attn_kd.nn.maps import attention_map

B, H, Lq, Lk, D = 2, 3, 4, 5, 8
SHOWN = torch.tensor([[[1, 1, 1, 0, 0]] * 3 + [[0] * 5], [[1] * 5] * 4], dtype=torch.bool)[:, None]


def hiding(value):
    bias = torch.randn(SHOWN.shape, dtype=torch.float64)
    return bias.masked_fill(~SHOWN, value)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(None, id="none"),
        pytest.param(SHOWN, id="bool"),
        pytest.param(hiding(float("-inf")), id="minus-infinity"),
        pytest.param(hiding(-1e9), id="minus-1e9"),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.7], ids=["default-scale", "scale"])
def test_map_times_value_is_the_output_of_the_operator(mask, scale):
    tokens = [torch.randn(B, H, n, D, dtype=torch.float64) for n in (Lq, Lk, Lk)]
    results = []
    for explicit in (True, False):
        query, key, value = (x.clone().requires_grad_() for x in tokens)
        if explicit:
            output = attention_map(query, key, mask, scale) @ value
        else:
            output = attention(query, key, value, attn_mask=mask, scale=scale).output
        loss = (output * torch.linspace(0, 1, D, dtype=torch.float64)).sum()
        results.append((output, torch.autograd.grad(loss, (query, key, value))))
    torch.testing.assert_close(*results)


def test_map_has_the_dtype_of_the_query_under_autocast_too():
    query = torch.randn(1, 1, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_map(query, query).dtype == torch.float32
