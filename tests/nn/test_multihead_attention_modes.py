"""attn_kd.nn.MultiheadAttention under dropout, autocast, torch.compile, copying and pickling."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import attn_kd.nn
from tests.nn.layers import KEYS, QUERIES, Tokens, both, cross_tokens, padding, run, self_tokens


def test_dropout_of_an_open_map_is_that_of_torch():
    theirs, ours = both(dropout=0.4)
    tokens, results = cross_tokens(), []
    for layer in (theirs, ours):
        torch.manual_seed(5)
        results.append(run(layer, tokens, key_padding_mask=padding()))
    torch.testing.assert_close(results[1], results[0])


def test_dropout_follows_the_generator_and_acts_in_training_alone():
    _, layer = both(dropout=0.4)
    tokens, outputs = cross_tokens(), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(run(layer, tokens, need_weights=False))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.equal(outputs[0]["output"], outputs[2]["output"])
    layer.eval()
    assert torch.equal(*(layer(*tokens, need_weights=False)[0] for _ in range(2)))


def test_mean_over_dropout_is_the_output_without():
    _, layer = both(dropout=0.3)
    tokens = cross_tokens()
    with torch.no_grad():
        runs = torch.stack([layer(*tokens, need_weights=False)[0] for _ in range(2000)])
        expected = layer.eval()(*tokens, need_weights=False)[0]
    # Six standard deviations of the mean, for some 360 numbers.
    assert ((runs.mean(0) - expected).abs() <= 6 * runs.std(0) / 2000**0.5).all()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_autocast(masked):
    exact, _ = both()
    theirs, ours = (layer.float() for layer in both())
    for layer in (theirs, ours):
        layer.load_state_dict(exact.state_dict())
    x = self_tokens().query
    mask = padding(x.shape[0]) if masked else None
    expected = exact(x, x, x, key_padding_mask=mask)[0]
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        peer, _ = theirs(x, x, x, key_padding_mask=mask, need_weights=False)
        output, _ = ours(x, x, x, key_padding_mask=mask, need_weights=False)
        assert ours(x, x, x, key_padding_mask=mask)[1].shape == (3, 5, 5)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in ours.parameters())
    assert (output.double() - expected).norm() <= 2 * (peer.double() - expected).norm()


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output+map"])
def test_compiled_layer_is_one_graph(need_weights):
    torch._dynamo.reset()
    theirs, layer = both()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    arguments = {"key_padding_mask": padding(), "need_weights": need_weights}
    tokens = cross_tokens()
    expected = run(theirs, tokens, **arguments)
    torch.testing.assert_close(run(layer, tokens, **arguments), expected)
    actual = {
        name.replace("_orig_mod.", ""): x for name, x in run(compiled, tokens, **arguments).items()
    }
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_compute_the_same(copied):
    _, layer = both(batch_first=True)
    if copied == "deepcopy":
        copy_ = copy.deepcopy(layer)
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        copy_ = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert type(copy_) is attn_kd.nn.MultiheadAttention
    tokens = cross_tokens(batch_first=True)
    assert torch.equal(copy_(*tokens)[0], layer(*tokens)[0])
    assert not {p.data_ptr() for p in copy_.parameters()} & {
        p.data_ptr() for p in layer.parameters()
    }


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output+map"])
@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty_input_gives_an_empty_output(empty, need_weights):
    query, key, value = cross_tokens()
    if empty == "batch":
        query, key, value = query[:, :0], key[:, :0], value[:, :0]
    else:
        query = query[:0]
    tokens = Tokens(query, key, value)
    theirs, ours = (run(layer, tokens, need_weights=need_weights) for layer in both())
    assert ours["output"].numel() == 0
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output+map"])
def test_queries_without_any_key_get_the_bias_of_the_output_alone(need_weights):
    query, key, value = cross_tokens()
    tokens = Tokens(query, key[:0], value[:0])
    layers = both()
    for layer in layers:
        torch.nn.init.constant_(layer.out_proj.bias, 0.5)
    theirs, ours = (run(layer, tokens, need_weights=need_weights) for layer in layers)
    assert (ours["output"] == 0.5).all() and ours["output"].numel() > 0
    torch.testing.assert_close(ours, theirs)


def test_a_mask_of_no_keys_hides_none():
    """Where torch raises, without a map."""
    query, key, value = cross_tokens()
    _, layer = both()
    expected = layer(query, key[:0], value[:0])[0]
    mask = torch.zeros(query.shape[1], 0, dtype=torch.bool)
    output, _ = layer(query, key[:0], value[:0], key_padding_mask=mask, need_weights=False)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output+map"])
def test_row_of_finite_lowest_biases_sees_no_key(need_weights):
    _, layer = both(bias=False)
    tokens = cross_tokens()
    mask = torch.full((QUERIES, KEYS), -1e6, dtype=torch.float64)
    output, _ = layer(*tokens, attn_mask=mask, need_weights=need_weights)
    assert not output.any()
