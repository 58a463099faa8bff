"""attn_kd as an attention implementation of transformers: results, masks, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_kd import AttentionDistiller
from attn_kd.errors import InputError
from attn_kd.integrations.transformers import (
    SwitchedImplementation,
    attention_forward,
    attention_mask,
    register,
    untapped_implementation,
)
from tests.tiny_detr import tiny_batch, tiny_detr


@pytest.fixture(autouse=True)
def registered():
    register()


def use(model, implementation):
    """Set the implementation of all but the backbone, which knows "eager" only."""
    model.set_attn_implementation({"": implementation})
    return model


def test_registering_twice_changes_nothing():
    functions = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    register()
    assert (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)) == functions
    assert functions[0]["attn_kd"] is attention_forward
    assert functions[1]["attn_kd"] is attention_mask


def test_public_setter_takes_the_name():
    model = tiny_detr()
    model.set_attn_implementation("attn_kd")
    assert model.config._attn_implementation == "attn_kd"


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@torch.no_grad()
def test_detr_gives_what_eager_attention_gives(padded):
    model, batch = tiny_detr().double(), tiny_batch(padded=padded, dtype=torch.float64)
    expected = use(model, "eager")(**batch)
    actual = use(model, "attn_kd")(**batch)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes)


@torch.no_grad()
def test_scaling_of_a_module_is_its_own():
    model, batch = tiny_detr().double(), tiny_batch(dtype=torch.float64)
    usual = use(model, "attn_kd")(**batch).logits
    for name, module in model.named_modules():
        if name.endswith("attn"):
            module.scaling *= 0.6
    expected = use(model, "eager")(**batch).logits
    assert not torch.allclose(expected, usual)
    torch.testing.assert_close(use(model, "attn_kd")(**batch).logits, expected)


def padding_error(model) -> float:
    """How much the logits of a 40 x 48 image change when it is padded to 64 x 64.

    The image is black beyond its corner, further than the backbone's convolutions reach from
    there: at an edge they tell padding from nothing, whatever the attention does.
    """
    canvas = torch.zeros(1, 3, 64, 64)
    canvas[:, :, :12, :12] = tiny_batch(padded=False)["pixel_values"][:1, :, :12, :12]
    mask = torch.zeros(1, 64, 64, dtype=torch.long)
    mask[:, :40, :48] = 1
    with torch.no_grad():
        alone = model(pixel_values=canvas[:, :, :40, :48], pixel_mask=mask[:, :40, :48])
        padded = model(pixel_values=canvas, pixel_mask=mask)
    return (alone.logits - padded.logits).abs().max().item()


def test_padding_an_image_changes_nothing():
    model = tiny_detr()
    assert padding_error(use(model, "sdpa")) < 1e-5  # what can be had in float32
    assert padding_error(use(model, "attn_kd")) < 1e-5


def test_padding_would_change_the_output_without_the_mask_registration():
    AttentionInterface.register("attn_kd_maskless", attention_forward)
    try:
        assert padding_error(use(tiny_detr(), "attn_kd_maskless")) > 1e-2
    finally:
        del AttentionInterface._global_mapping["attn_kd_maskless"]


@pytest.mark.parametrize("encoder_tokens", [None, 6], ids=["self", "cross"])
def test_padding_mask_is_not_expanded_over_the_queries(encoder_tokens):
    config = use(tiny_detr(), "attn_kd").config
    queries = torch.zeros(2, 4, 32)
    keys = queries if encoder_tokens is None else torch.zeros(2, encoder_tokens, 32)
    padding = torch.ones(2, keys.shape[1], dtype=torch.long)
    padding[1, 2:] = 0
    mask = create_bidirectional_mask(
        config, queries, padding, encoder_hidden_states=None if keys is queries else keys
    )
    assert mask.dtype == torch.bool
    assert torch.equal(mask, padding.bool()[:, None, None, :])


def test_no_mask_where_nothing_is_padded():
    config = use(tiny_detr(), "attn_kd").config
    padding = torch.ones(2, 4, dtype=torch.long)
    assert create_bidirectional_mask(config, torch.zeros(2, 4, 32), padding) is None


@torch.no_grad()
def test_causal_model_with_grouped_keys_gives_what_sdpa_gives():
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    tokens = torch.randint(11, (2, 6))
    padding = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    for mask in (None, padding):
        expected = use(model, "sdpa")(tokens, attention_mask=mask).last_hidden_state
        actual = use(model, "attn_kd")(tokens, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(actual[:, :4], expected[:, :4])


@torch.no_grad()
def test_encoder_with_padding_compiles_into_one_graph():
    encoder = use(tiny_detr(encoder_layers=1), "attn_kd").model.encoder
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[1, 4:] = 0
    inputs = {"inputs_embeds": torch.randn(2, 6, 32), "attention_mask": padding}
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(**inputs).last_hidden_state, encoder(**inputs).last_hidden_state
    )


def test_gradients_are_those_of_eager_attention():
    model, batch = tiny_detr().double(), tiny_batch(dtype=torch.float64)
    gradients = {}
    for implementation in ("eager", "attn_kd"):
        loss = use(model, implementation)(**batch).logits.square().sum()
        parameters = [p for p in model.model.encoder.parameters() if p.requires_grad]
        gradients[implementation] = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(gradients["attn_kd"], gradients["eager"])


def test_attention_dropout_acts_in_training_only_and_follows_the_seed():
    model, batch = use(tiny_detr(attention_dropout=0.5), "attn_kd"), tiny_batch()

    def logits(training):
        torch.manual_seed(7)
        return model.train(training)(**batch).logits

    without = use(tiny_detr(), "attn_kd")(**batch).logits
    torch.testing.assert_close(logits(training=False), without)
    dropped = logits(training=True)
    assert (dropped - without).abs().max() > 1e-2
    assert torch.equal(logits(training=True), dropped)


def test_distilled_divergence_is_that_of_the_maps_before_dropout():
    teacher, batch = tiny_detr(seed=1), tiny_batch()
    result = {}
    for dropout in (0.0, 0.5):
        student = tiny_detr(seed=2, encoder_layers=1, attention_dropout=dropout).train()
        with AttentionDistiller(teacher, student) as distiller:
            result[dropout] = distiller(**batch)
    torch.testing.assert_close(result[0.5].attention_kl, result[0.0].attention_kl)
    assert (result[0.5].student.logits - result[0.0].student.logits).abs().max() > 1e-2


def test_asking_for_maps_is_refused():
    with pytest.raises(InputError, match=r"output_attentions=True.*eager"):
        use(tiny_detr(), "attn_kd")(**tiny_batch(), output_attentions=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"is_causal": True}, "causal attention without a mask", id="causal"),
        pytest.param({"softcap": 30.0}, "softcap", id="softcap"),
        pytest.param({"s_aux": torch.zeros(1)}, "s_aux", id="sinks"),
        pytest.param({"position_bias": torch.zeros(1, 1, 3, 3)}, "position_bias", id="bias"),
    ],
)
def test_what_the_operator_lacks_is_refused_by_name(arguments, message):
    query = torch.zeros(1, 1, 3, 4)
    arguments = {"is_causal": False, **arguments}
    with pytest.raises(NotImplementedError, match=message):
        attention_forward(nn.Identity(), query, query, query, None, **arguments)


def test_switching_and_undoing_leaves_the_backbone_alone():
    model = tiny_detr()
    module = model.get_submodule("model.encoder.layers.0.self_attn")
    backbone = model.config.backbone_config._attn_implementation
    switched = SwitchedImplementation(model, module)
    assert (switched.original, model.config._attn_implementation) == ("sdpa", "attn_kd")
    assert model.config.backbone_config._attn_implementation == backbone
    switched.undo()
    assert model.config._attn_implementation == "sdpa"


def test_switching_and_undoing_leaves_a_submodule_of_another_model_alone():
    student, teacher = tiny_detr(), tiny_detr()
    student.model.backbone = teacher.model.backbone  # its configuration is no part of the student's
    backbone = teacher.config.backbone_config
    before = backbone._attn_implementation
    module = student.get_submodule("model.encoder.layers.0.self_attn")
    switched = SwitchedImplementation(student, module)
    assert (student.config._attn_implementation, backbone._attn_implementation) == (
        "attn_kd",
        before,
    )
    switched.undo()
    assert (student.config._attn_implementation, backbone._attn_implementation) == ("sdpa", before)


def test_model_that_cannot_be_switched_is_refused(monkeypatch):
    model = tiny_detr()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda _: False))
    module = model.get_submodule("model.encoder.layers.0.self_attn")
    with pytest.raises(InputError, match="DetrForObjectDetection does not let its attention"):
        SwitchedImplementation(model, module)


@pytest.mark.parametrize(
    ("originals", "untapped"),
    [
        (["sdpa", "sdpa"], "sdpa"),
        (["attn_kd"], "attn_kd"),
        (["eager"], "sdpa"),
        (["attn_kd", "sdpa"], "sdpa"),
    ],
)
def test_layers_beside_tapped_ones_keep_an_implementation_that_takes_bool_masks(
    originals, untapped
):
    assert untapped_implementation(originals) == untapped
