"""The distilled divergence and its gradient against explicit maps, and the distiller's checks."""

from __future__ import annotations

import copy

import pytest
import torch

from attn_kd import AttentionDistiller
from attn_kd.errors import InputError
from tests.distill.explicit import (
    attention_map,
    explicit_encoder_kl,
    explicit_kl,
    gradients,
)
from tests.tiny_detr import tiny_batch, tiny_detr

ENCODER_0 = "model.encoder.layers.0.self_attn"
ENCODER_1 = "model.encoder.layers.1.self_attn"
DECODER_SELF = "model.decoder.layers.0.self_attn"
DECODER_CROSS = "model.decoder.layers.0.encoder_attn"


@pytest.fixture
def teacher():
    return tiny_detr(seed=1).double()


@pytest.fixture
def student():
    return tiny_detr(seed=2, encoder_layers=1).double()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_value_and_gradients_are_those_of_explicit_maps(teacher, student, padded, divergence):
    batch = tiny_batch(padded=padded, dtype=torch.float64)
    eager_student, eager_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    expected = explicit_encoder_kl(eager_student, eager_teacher, batch, divergence=divergence)
    with AttentionDistiller(teacher, student, divergence=divergence) as distiller:
        actual = distiller(**batch).attention_kl
        assert actual > 0.1  # the maps do differ
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        actual_gradients = gradients(actual, student)
    expected_gradients = gradients(expected, eager_student)
    assert expected_gradients["model.encoder.layers.0.self_attn.q_proj.weight"].norm() > 1e-3
    assert expected_gradients["model.input_projection.weight"].norm() > 1e-3
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-5, atol=1e-9)


def test_scalings_of_both_layers_are_their_own(teacher, student):
    teacher.get_submodule(ENCODER_1).scaling *= 0.6
    student.get_submodule(ENCODER_0).scaling *= 1.3
    batch = tiny_batch(dtype=torch.float64)
    eager_student, eager_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    expected = explicit_encoder_kl(eager_student, eager_teacher, batch)
    with AttentionDistiller(teacher, student) as distiller:
        actual = distiller(**batch).attention_kl
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        actual_gradients = gradients(actual, student)
    expected_gradients = gradients(expected, eager_student)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-5, atol=1e-9)


def test_gradients_reach_the_student_through_output_and_divergence(teacher, student):
    batch = tiny_batch(dtype=torch.float64)
    eager_student, eager_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    kl = explicit_encoder_kl(eager_student, eager_teacher, batch)
    expected = gradients(kl + eager_student(**batch).logits.square().sum(), eager_student)
    with AttentionDistiller(teacher, student) as distiller:
        result = distiller(**batch)
        actual = gradients(result.attention_kl + result.student.logits.square().sum(), student)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


def test_outputs_are_those_of_the_models_alone(teacher, student):
    batch = tiny_batch(dtype=torch.float64)
    expected = student(**batch).logits, teacher(**batch).logits
    with AttentionDistiller(teacher, student) as distiller:
        result = distiller(**batch)
    torch.testing.assert_close(result.student.logits, expected[0])
    torch.testing.assert_close(result.teacher.logits, expected[1])
    assert not result.teacher.logits.requires_grad


def test_several_pairs_are_averaged(teacher, student):
    batch = tiny_batch(padded=False, dtype=torch.float64)
    layers = {ENCODER_0: ENCODER_1, DECODER_SELF: DECODER_SELF, DECODER_CROSS: DECODER_CROSS}
    kinds = {ENCODER_0: "encoder", DECODER_SELF: "decoder", DECODER_CROSS: "cross"}
    with AttentionDistiller(teacher, student, layers=layers) as distiller:
        result = distiller(**batch)
        assert distiller.layers == layers
    for path, kind in kinds.items():
        maps = [attention_map(model, batch, kind, -1) for model in (student, teacher)]
        torch.testing.assert_close(
            result.attention_kl_per_layer[path], explicit_kl(*maps), rtol=1e-6, atol=0
        )
    mean = sum(result.attention_kl_per_layer.values()) / 3
    torch.testing.assert_close(result.attention_kl, mean)


def test_object_queries_of_padded_images_all_count(teacher, student):
    batch = tiny_batch(dtype=torch.float64)
    layers = {DECODER_CROSS: DECODER_CROSS}
    with AttentionDistiller(teacher, student, layers=layers) as distiller:
        actual = distiller(**batch).attention_kl
    maps = [attention_map(model, batch, "cross", -1) for model in (student, teacher)]
    torch.testing.assert_close(actual, explicit_kl(*maps), rtol=1e-6, atol=0)


def test_two_student_layers_may_learn_from_one_teacher_layer(teacher):
    student, batch = tiny_detr(seed=2).double(), tiny_batch(dtype=torch.float64)
    layers = {ENCODER_0: ENCODER_1, ENCODER_1: ENCODER_1}
    with AttentionDistiller(teacher, student, layers=layers) as distiller:
        per_layer = distiller(**batch).attention_kl_per_layer
    for index, path in enumerate(layers):
        expected = explicit_encoder_kl(student, teacher, batch, student_layer=index)
        torch.testing.assert_close(per_layer[path], expected, rtol=1e-6, atol=0)


def test_padding_content_does_not_reach_the_divergence(teacher, student):
    # The backbone sees over the edge of an image; the tokens themselves are what is varied here.
    batch = tiny_batch(dtype=torch.float64)
    kls = []
    for fill in (0.0, 5.0):
        hooks = [
            model.model.input_projection.register_forward_hook(
                lambda _, __, output, fill=fill: output.where(
                    batch["pixel_mask"][:, None, ::8, ::8].bool(), fill
                )
            )
            for model in (teacher, student)
        ]
        with AttentionDistiller(teacher, student) as distiller:
            kls.append(distiller(**batch).attention_kl)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(kls[0], kls[1])


def test_teacher_of_another_width_is_fine_with_as_many_heads(student):
    teacher, batch = tiny_detr(seed=1, d_model=48).double(), tiny_batch(dtype=torch.float64)
    with AttentionDistiller(teacher, student) as distiller:
        actual = distiller(**batch).attention_kl
    torch.testing.assert_close(
        actual, explicit_encoder_kl(student, teacher, batch), rtol=1e-6, atol=0
    )


def test_teacher_inputs_of_its_own(teacher, student):
    batch, other = (tiny_batch(dtype=torch.float64, seed=seed) for seed in (0, 1))
    with AttentionDistiller(teacher, student) as distiller:
        actual = distiller.run(batch, teacher_inputs=other)
    torch.testing.assert_close(actual.student.logits, student(**batch).logits)
    torch.testing.assert_close(actual.teacher.logits, teacher(**other).logits)


def test_both_maps_are_taken_under_the_students_mask():
    # Learned position embeddings do not depend on the mask, so the first layer's logits are equal.
    student = tiny_detr(encoder_layers=1, position_embedding_type="learned").double()
    batch = tiny_batch(dtype=torch.float64)
    with AttentionDistiller(copy.deepcopy(student), student) as distiller:
        unmasked = {"pixel_values": batch["pixel_values"]}
        kl = distiller.run(batch, teacher_inputs=unmasked).attention_kl
    torch.testing.assert_close(kl, torch.zeros_like(kl))


def test_teacher_is_not_asked_for_a_loss(teacher, student):
    with AttentionDistiller(teacher.float(), student.float()) as distiller:
        result = distiller(**tiny_batch(labels=True))
    assert result.teacher.loss is None
    assert result.student.loss is not None


def test_different_head_counts_are_explained(student):
    teacher = tiny_detr(seed=1, heads=2).double()
    with (
        AttentionDistiller(teacher, student) as distiller,
        pytest.raises(InputError, match=r"has 4 heads.*has 2.*head_reduction"),
    ):
        distiller(**tiny_batch(dtype=torch.float64))


def test_different_grids_are_named(teacher, student):
    batch = tiny_batch(padded=False, dtype=torch.float64)
    small = {"pixel_values": batch["pixel_values"][..., :48]}
    with (
        AttentionDistiller(teacher, student) as distiller,
        pytest.raises(InputError, match=r"from 64 to 64 tokens.*from 48 to 48"),
    ):
        distiller.run(batch, teacher_inputs=small)


def test_one_model_cannot_be_both(teacher):
    with pytest.raises(InputError, match="one model"):
        AttentionDistiller(teacher, teacher)


def test_what_is_no_model_is_named(teacher):
    with pytest.raises(InputError, match=r"student is str, expected a torch\.nn\.Module"):
        AttentionDistiller(teacher, "detr-1-1")


def test_unknown_divergence_is_refused(teacher, student):
    with pytest.raises(InputError, match="'euclid'"):
        AttentionDistiller(teacher, student, divergence="euclid")


def test_model_without_further_keywords_is_distilled_all_the_same(teacher, student):
    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.detector = student

        def forward(self, pixel_values, pixel_mask):
            return self.detector(pixel_values, pixel_mask)

    batch = tiny_batch(dtype=torch.float64)
    with AttentionDistiller(teacher, student) as distiller:
        expected = distiller(**batch).attention_kl
    with AttentionDistiller(teacher, Narrow()) as distiller:
        assert distiller(**batch).attention_kl == expected


def test_layer_that_does_not_run_is_named(teacher, student):
    class Forgetful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.detector = student

        def forward(self, pixel_values, pixel_mask, **kwargs):
            return self.detector(pixel_values, pixel_mask)

    with (
        AttentionDistiller(teacher, Forgetful()) as distiller,
        pytest.raises(InputError, match=f"student layer 'detector.{ENCODER_0}' did not run"),
    ):
        distiller(**tiny_batch(dtype=torch.float64))


def test_closed_distiller_is_refused(teacher, student):
    distiller = AttentionDistiller(teacher, student)
    distiller.close()
    distiller.close()
    with pytest.raises(InputError, match="closed"):
        distiller(**tiny_batch(dtype=torch.float64))
