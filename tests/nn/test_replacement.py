"""Replacing torch.nn.MultiheadAttention in a model that is already there, and undoing it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attn_kd.nn
from attn_kd.nn import replace_multihead_attention, restore_multihead_attention
from tests.nn.layers import EMBED, HEADS, Listener, cross_tokens, padding, self_tokens
from tests.plain_detr import plain_batch, plain_detr

PATHS = [
    "transformer.encoder.layers.0.self_attn",
    "transformer.encoder.layers.1.self_attn",
    "transformer.decoder.layers.0.self_attn",
    "transformer.decoder.layers.0.multihead_attn",
]


@pytest.fixture
def model():
    return plain_detr(seed=1)


def test_replaced_modules_are_the_same_objects_at_the_same_paths(model):
    modules = dict(model.named_modules())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert replace_multihead_attention(model) == PATHS
    assert all(module is modules[path] for path, module in model.named_modules())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(type(modules[path]) is attn_kd.nn.MultiheadAttention for path in PATHS)


def test_replacing_again_changes_nothing(model):
    replace_multihead_attention(model)
    assert replace_multihead_attention(model) == []


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("returns_weights", [False, True], ids=["no-maps", "maps"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_outputs_and_gradients_stay(model, padded, returns_weights, training):
    model.train(training)
    original, batch, results = copy.deepcopy(model), plain_batch(padded=padded), []
    replace_multihead_attention(model, returns_weights=returns_weights)
    for each in (original, model):
        output = each(**batch)
        loss = output["pred_logits"].square().sum() + output["pred_boxes"].square().sum()
        results.append((output, torch.autograd.grad(loss, list(each.parameters()))))
    torch.testing.assert_close(results[1], results[0])


def test_state_of_the_original_loads(model):
    replaced = plain_detr(seed=2)
    replace_multihead_attention(replaced)
    replaced.load_state_dict(model.state_dict())
    torch.testing.assert_close(replaced(**plain_batch()), model(**plain_batch()))


def test_hooks_modes_and_shared_modules_stay():
    attention = nn.MultiheadAttention(EMBED, HEADS, dropout=0.1).eval()
    calls = []
    attention.register_forward_hook(lambda *_: calls.append(1))
    model = nn.ModuleDict({"one": attention, "other": attention})
    assert replace_multihead_attention(model) == ["one"]
    assert model["one"] is model["other"] is attention
    assert not attention.training
    assert attention.dropout == 0.1
    attention(*[torch.randn(5, 2, EMBED)] * 3)
    assert calls == [1]


def test_subclasses_are_left_alone_with_a_warning():
    class Special(nn.MultiheadAttention):
        pass

    model = nn.Sequential(Special(EMBED, HEADS))
    with pytest.warns(UserWarning, match=r"not replaced.*'0' \(Special\)"):
        assert replace_multihead_attention(model) == []
    assert type(model[0]) is Special


def test_model_may_be_the_layer_itself():
    layer = nn.MultiheadAttention(EMBED, HEADS, kdim=10)
    assert replace_multihead_attention(layer) == [""]
    assert isinstance(layer, attn_kd.nn.MultiheadAttention)


def test_restoring_leaves_no_trace(model):
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    replace_multihead_attention(model, returns_weights=False)
    model.get_submodule(PATHS[0]).self_attention = True
    assert restore_multihead_attention(model) == PATHS
    assert all(type(model.get_submodule(path)) is nn.MultiheadAttention for path in PATHS)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_encoder_of_torch_that_is_there_already():
    layer = nn.TransformerEncoderLayer(
        EMBED, HEADS, 32, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = self_tokens(batch_first=True).query, padding(5)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=mask)
        paths = replace_multihead_attention(encoder)
        taps = [Listener() for _ in paths]
        modules = [encoder.get_submodule(path) for path in paths]
        with attn_kd.nn.carried_taps(zip(modules, taps, strict=True)):
            actual = encoder(x, src_key_padding_mask=mask)
        assert [tap.calls for tap in taps] == [1, 1]
        # torch's own nested tensors give 0 at padded positions.
        torch.testing.assert_close(actual[~mask], expected[~mask])
        restore_multihead_attention(encoder)
        assert torch.equal(encoder(x, src_key_padding_mask=mask), expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["length-first", "batch-first"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_whole_transformer_of_torch(batch_first, training):
    options = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    model = nn.Transformer(EMBED, HEADS, 2, 2, 32, **options).train(training)
    tokens = cross_tokens(batch_first=batch_first)
    arguments = {
        "src_key_padding_mask": padding(),
        "memory_key_padding_mask": padding(),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
    }
    expected = model(tokens.key, tokens.query, **arguments)
    assert len(replace_multihead_attention(model)) == 2 + 2 * 2
    torch.testing.assert_close(model(tokens.key, tokens.query, **arguments), expected)


def test_parametrized_layer_is_left_alone_with_a_warning(model):
    nn.utils.parametrizations.weight_norm(model.get_submodule(PATHS[1]), "in_proj_weight")
    with pytest.warns(UserWarning, match=rf"not replaced.*{PATHS[1]}.*Parametrized"):
        replaced = replace_multihead_attention(model)
    assert replaced == [path for path in PATHS if path != PATHS[1]]
