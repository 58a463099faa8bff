"""attn_kd.nn.MultiheadAttention against torch.nn.MultiheadAttention: results and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attn_kd.nn
from attn_kd import available_backends
from tests.nn.layers import (
    BATCH,
    EMBED,
    HEADS,
    KEYS,
    QUERIES,
    Tokens,
    additive,
    both,
    cross_tokens,
    padding,
    run,
    self_tokens,
)

CONSTRUCTORS = [
    pytest.param({}, id="default"),
    pytest.param({"bias": False}, id="no-bias"),
    pytest.param({"batch_first": True}, id="batch-first"),
    pytest.param({"kdim": 10, "vdim": 6}, id="kdim-vdim"),
    pytest.param({"kdim": 10, "bias": False}, id="kdim-no-bias"),
    pytest.param({"add_bias_kv": True}, id="bias-kv"),
    pytest.param({"add_zero_attn": True}, id="zero-attn"),
    pytest.param({"add_bias_kv": True, "add_zero_attn": True, "vdim": 6}, id="everything"),
]
CAUSAL = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
SOME = torch.tensor([[j == (i + 1) % KEYS for j in range(KEYS)] for i in range(QUERIES)])
EACH_HEAD = torch.stack([SOME.roll(i, dims=1) for i in range(BATCH * HEADS)])

every_constructor = pytest.mark.parametrize("options", CONSTRUCTORS)
with_and_without_weights = pytest.mark.parametrize(
    "need_weights", [False, True], ids=["output", "output+map"]
)


def shape_options(options):
    return {name: options[name] for name in ("batch_first", "kdim", "vdim") if name in options}


@every_constructor
def test_parameters_and_their_initialisation_are_those_of_torch(options):
    layers = []
    for build in (nn.MultiheadAttention, attn_kd.nn.MultiheadAttention):
        torch.manual_seed(3)
        layers.append(build(EMBED, HEADS, **options))
    theirs, ours = (layer.state_dict() for layer in layers)
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@every_constructor
def test_each_loads_the_state_of_the_other(options):
    theirs, ours = both(**options)
    again = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    again.load_state_dict(ours.state_dict())
    tokens = cross_tokens(**shape_options(options))
    assert torch.equal(again(*tokens)[0], theirs(*tokens)[0])


def test_device_and_dtype_reach_every_parameter():
    layer = attn_kd.nn.MultiheadAttention(EMBED, HEADS, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@every_constructor
@with_and_without_weights
def test_cross_attention(options, need_weights):
    theirs, ours = both(**options)
    tokens = cross_tokens(**shape_options(options))
    arguments = {"key_padding_mask": padding(), "need_weights": need_weights}
    torch.testing.assert_close(run(ours, tokens, **arguments), run(theirs, tokens, **arguments))


@pytest.mark.parametrize("batch_first", [False, True], ids=["length-first", "batch-first"])
@with_and_without_weights
def test_self_attention_of_one_tensor(batch_first, need_weights):
    theirs, ours = both(batch_first=batch_first)
    tokens = self_tokens(batch_first=batch_first)
    arguments = {"key_padding_mask": padding(QUERIES), "need_weights": need_weights}
    torch.testing.assert_close(run(ours, tokens, **arguments), run(theirs, tokens, **arguments))


@with_and_without_weights
@pytest.mark.parametrize(
    ("key_padding_mask", "attn_mask"),
    [
        pytest.param(None, None, id="none"),
        pytest.param(padding(), None, id="padding"),
        pytest.param(additive(padding()), None, id="float-padding"),
        pytest.param(None, SOME, id="shared"),
        pytest.param(None, additive(SOME), id="float-shared"),
        pytest.param(None, EACH_HEAD, id="each-head"),
        pytest.param(None, additive(EACH_HEAD), id="float-each-head"),
        pytest.param(padding(), SOME, id="padding+shared"),
        pytest.param(padding(), EACH_HEAD, id="padding+each-head"),
        pytest.param(additive(padding()), additive(SOME), id="float-padding+float-shared"),
        pytest.param(padding(), additive(EACH_HEAD), id="padding+float-each-head"),
        pytest.param(additive(padding()), SOME, id="float-padding+shared"),
    ],
)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")  # torch's own, of mixtures
def test_masks(key_padding_mask, attn_mask, need_weights):
    theirs, ours = both()
    arguments = {
        "key_padding_mask": key_padding_mask,
        "attn_mask": attn_mask,
        "need_weights": need_weights,
    }
    tokens = cross_tokens()
    torch.testing.assert_close(run(ours, tokens, **arguments), run(theirs, tokens, **arguments))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_masks_do_not_hide_the_extra_keys(options, floating):
    theirs, ours = both(**options)
    mask = additive(EACH_HEAD) if floating else EACH_HEAD
    tokens = cross_tokens()
    torch.testing.assert_close(
        run(ours, tokens, attn_mask=mask), run(theirs, tokens, attn_mask=mask)
    )


@with_and_without_weights
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_causal_hint_comes_with_its_mask(padded, need_weights):
    theirs, ours = both()
    arguments = {"attn_mask": CAUSAL, "is_causal": True, "need_weights": need_weights}
    if padded:
        arguments["key_padding_mask"] = padding(QUERIES)
    tokens = self_tokens()
    torch.testing.assert_close(run(ours, tokens, **arguments), run(theirs, tokens, **arguments))


def test_map_of_every_head():
    theirs, ours = both()
    arguments = {"key_padding_mask": padding(), "average_attn_weights": False}
    results = run(ours, cross_tokens(), **arguments)
    assert results["weights"].shape == (BATCH, HEADS, QUERIES, KEYS)
    tokens = cross_tokens()
    torch.testing.assert_close(run(ours, tokens, **arguments), run(theirs, tokens, **arguments))


@pytest.mark.parametrize("batch_first", [False, True], ids=["length-first", "batch-first"])
@pytest.mark.parametrize("average", [False, True], ids=["each-head", "average"])
@with_and_without_weights
def test_inputs_without_a_batch(batch_first, average, need_weights):
    theirs, ours = both(batch_first=batch_first)
    tokens = Tokens(*(x[:, 0] for x in cross_tokens()))
    arguments = {
        "key_padding_mask": padding()[1],
        "attn_mask": EACH_HEAD[:HEADS],
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    torch.testing.assert_close(run(ours, tokens, **arguments), run(theirs, tokens, **arguments))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_evaluation_mode_agrees_with_the_fast_path_of_torch(padded, grad):
    theirs, ours = (layer.eval() for layer in both(batch_first=True))
    mask = padding(QUERIES) if padded else None
    tokens = self_tokens(batch_first=True)
    with torch.set_grad_enabled(grad):
        expected, _ = theirs(*tokens, key_padding_mask=mask, need_weights=False)
        actual, weights = ours(*tokens, key_padding_mask=mask, need_weights=False)
    torch.testing.assert_close(actual, expected)
    assert weights is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_torch(dtype):
    truth, _ = both()
    rounded = Tokens(*(x.to(dtype) for x in cross_tokens()))
    theirs, ours = both(dtype=dtype)
    truth.load_state_dict(ours.state_dict())
    arguments = {"key_padding_mask": padding(), "need_weights": False}
    exact = run(truth, Tokens(*(x.double() for x in rounded)), **arguments)
    expected, actual = (run(layer, rounded, **arguments) for layer in (theirs, ours))
    for name in exact.keys() - {"weights"}:
        error, bar = ((r[name].double() - exact[name]).norm() for r in (actual, expected))
        # One rounding more: of few elements, torch's own error may be small by chance.
        assert error <= 2 * bar + torch.finfo(dtype).eps * exact[name].norm(), name


def test_rows_that_see_no_key_are_zero_and_have_no_gradient():
    _, ours = both(bias=False)
    mask = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    mask[1] = True
    for need_weights in (False, True):
        results = run(ours, cross_tokens(), key_padding_mask=mask, need_weights=need_weights)
        assert (results["output"][:, 1] == 0).all()
        assert all(x.isfinite().all() for x in results.values() if x is not None)
    assert (results["weights"][1] == 0).all()


def test_maps_can_be_declined_once_and_for_all():
    theirs, ours = both()
    ours.returns_weights = False
    tokens = cross_tokens()
    output, weights = ours(*tokens)
    assert weights is None
    torch.testing.assert_close(output, theirs(*tokens)[0])


@with_and_without_weights
def test_additive_mask_gets_its_gradient(need_weights):
    tokens, gradients = cross_tokens(), []
    for layer in both():
        mask = torch.linspace(0, 1, QUERIES * KEYS, dtype=torch.float64).view(QUERIES, KEYS)
        output, _ = layer(*tokens, attn_mask=mask.requires_grad_(), need_weights=need_weights)
        output.square().sum().backward()
        gradients.append(mask.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.skipif(not available_backends()["cpu"].available, reason="needs the compiled kernels")
def test_nothing_of_the_size_of_a_map_is_kept_for_backward():
    length = 300
    layer = attn_kd.nn.MultiheadAttention(EMBED, HEADS)
    x = torch.randn(length, BATCH, EMBED)
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[:, -5:] = True
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, x, x, key_padding_mask=mask, need_weights=False)
    assert max(sizes) <= 3 * x.numel() < length * length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"query": (5, EMBED)}, "key has shape .*or 2 for", id="query-unbatched"),
        pytest.param({"query": (5, 3, 9)}, "query has 9 features, expected 24", id="embed"),
        pytest.param({"key": (7, 3, 9)}, "key has 9 features, expected 24", id="kdim"),
        pytest.param({"value": (6, 3, EMBED)}, r"key .*\(7, 3, 24\).* value .*6", id="value"),
        pytest.param({"query": (5, 2, EMBED)}, "key has batch 3, expected 2", id="batch"),
        pytest.param(
            {"key_padding_mask": torch.zeros(7, 3, dtype=torch.bool)},
            r"key_padding_mask has shape \(7, 3\), expected \(3, 7\)",
            id="padding-shape",
        ),
        pytest.param(
            {"attn_mask": torch.zeros(7, 5, dtype=torch.bool)},
            r"attn_mask has shape \(7, 5\), expected \(5, 7\) or \(12, 5, 7\)",
            id="mask-shape",
        ),
        pytest.param(
            {"attn_mask": torch.zeros(5, 7, dtype=torch.long)},
            r"attn_mask is torch.int64, expected torch.bool",
            id="mask-dtype",
        ),
        pytest.param({"value": None}, "value is NoneType, expected a torch.Tensor", id="none"),
        pytest.param(
            {"key": torch.zeros(7, 3, EMBED, dtype=torch.float64)},
            "key is torch.float64, expected the weights' torch.float32",
            id="dtype",
        ),
        pytest.param(
            {"key_padding_mask": [True] * 7}, "key_padding_mask is list, expected", id="mask-list"
        ),
        pytest.param({"is_causal": True}, "is_causal=True without attn_mask", id="causal"),
    ],
)
def test_wrong_input_is_named(change, message):
    layer = attn_kd.nn.MultiheadAttention(EMBED, HEADS)
    shapes = {"query": (5, 3, EMBED), "key": (7, 3, EMBED), "value": (7, 3, EMBED)}
    arguments = {
        name: torch.randn(value) if isinstance(value, tuple) else value
        for name, value in {**shapes, **change}.items()
    }
    with pytest.raises(attn_kd.InputError, match=message):
        layer(**arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused():
    layer = attn_kd.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(5, EMBED)])
    with pytest.raises(attn_kd.InputError, match=r"nested tensor.*enable_nested_tensor=False"):
        layer(x, x, x)
