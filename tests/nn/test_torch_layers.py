"""torch's own transformer layers with attn_kd.nn.MultiheadAttention in them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attn_kd.nn
from tests.nn.layers import EMBED, HEADS, Listener, cross_tokens, padding, self_tokens


def encoder_layer(**options):
    """torch's encoder layer in evaluation mode and double precision, with attn_kd's attention."""
    layer = nn.TransformerEncoderLayer(
        EMBED, HEADS, 32, dropout=0.0, dtype=torch.float64, **options
    ).eval()
    swapped = copy.deepcopy(layer)
    swapped.self_attn = attn_kd.nn.MultiheadAttention(
        EMBED, HEADS, batch_first=layer.self_attn.batch_first, dtype=torch.float64
    )
    swapped.load_state_dict(layer.state_dict())
    return layer, swapped


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["length-first", "batch-first"])
def test_encoder_layer_of_torch_calls_it_in_every_mode(batch_first, norm_first, grad):
    layer, swapped = encoder_layer(batch_first=batch_first, norm_first=norm_first)
    x = self_tokens(batch_first=batch_first).query
    mask = padding(5)
    tap = Listener()
    with torch.set_grad_enabled(grad):
        expected = layer(x, src_key_padding_mask=mask)
        with attn_kd.nn.carried_taps([(swapped.self_attn, tap)]):
            actual = swapped(x, src_key_padding_mask=mask)
    assert tap.calls == 1
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_encoder_of_torch_calls_every_layer():
    layer, swapped = encoder_layer(batch_first=True)
    encoders = [nn.TransformerEncoder(each, 2).eval() for each in (layer, swapped)]
    taps = [Listener(), Listener()]
    x = self_tokens(batch_first=True).query
    # In evaluation mode torch makes one nested tensor of x: padded positions come back as 0.
    mask = padding(5)
    layers = [each.self_attn for each in encoders[1].layers]
    with torch.no_grad(), attn_kd.nn.carried_taps(zip(layers, taps, strict=True)):
        expected, actual = (encoder(x, src_key_padding_mask=mask) for encoder in encoders)
    assert [tap.calls for tap in taps] == [1, 1]
    torch.testing.assert_close(actual[~mask], expected[~mask])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_decoder_layer_of_torch(training):
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, 32, **options).train(training)
    swapped = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        setattr(
            swapped,
            name,
            attn_kd.nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64),
        )
    swapped.load_state_dict(layer.state_dict())
    tokens = cross_tokens(batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    results = [
        each(
            tokens.query,
            tokens.key,
            tgt_mask=causal,
            tgt_is_causal=True,
            memory_key_padding_mask=padding(),
        )
        for each in (layer, swapped)
    ]
    torch.testing.assert_close(results[1], results[0])
