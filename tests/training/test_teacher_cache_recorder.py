"""What a teacher cache holds is what the teacher computes, rounded."""

import copy
import math

import pytest
import torch

from attn_kd import attention_kl
from attn_kd.data import Augmentation, CocoDetection, DetectionCollator
from attn_kd.distill import TeacherRecorder
from attn_kd.errors import InputError
from attn_kd.models import load_detector, save_detector
from attn_kd.training import CacheOptions, cache_teacher
from attn_kd.training.sampling import sample_seed

LAST = "model.encoder.layers.1.self_attn"


def recorded(teacher, item, augmentation=None):
    """The pass of the live teacher on one item."""
    model, processor = load_detector(teacher)
    batch = DetectionCollator(processor, augmentation)([item])
    batch.pop("labels")
    with TeacherRecorder(model, [LAST]) as record:
        return record(batch)


def test_float32_cache_holds_what_the_teacher_computes(tiny_cache, tiny_teacher, tiny_data):
    live = recorded(tiny_teacher, CocoDetection(tiny_data, "train")[3])
    kept = tiny_cache.read(3)
    torch.testing.assert_close(kept.layers[LAST].query, live.records[LAST].query[0])
    torch.testing.assert_close(kept.layers[LAST].key, live.records[LAST].key[0])
    torch.testing.assert_close(kept.layers[LAST].lse, live.records[LAST].lse[0])
    torch.testing.assert_close(kept.logits, live.output.logits[0])
    torch.testing.assert_close(kept.boxes, live.output.pred_boxes[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_divergence_is_exact_for_the_factors_as_they_are_stored(
    tiny_teacher, tiny_data, tmp_path, dtype
):
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache", CacheOptions(dtype=dtype))
    kept, (layer,) = cache.read(0).layers[LAST], cache.recipe.layers
    logits = kept.query.double() @ kept.key.double().mT * layer.scale
    exact = logits.logsumexp(-1)
    # float32 keeps 24 bits; the sum is over 16 keys.
    torch.testing.assert_close(kept.lse.double(), exact, rtol=1e-6, atol=1e-6)
    # The teacher's own LSE, before the rounding, is another one.
    own = recorded(tiny_teacher, CocoDetection(tiny_data, "train")[0]).records[LAST].lse[0]
    assert (own - exact).abs().max() > 10 * (kept.lse - exact).abs().max()

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, *kept.query.shape)
    kl = attention_kl(
        query,
        key,
        value,
        kept.query[None],
        kept.key[None],
        teacher_lse=kept.lse[None],
        teacher_scale=layer.scale,
    ).kl
    student = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).log_softmax(-1)
    expected = (student.exp() * (student - logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_kind_of_layer_is_described(tiny_cache):
    described = {layer.path: layer for layer in tiny_cache.recipe.layers}
    kinds = {path: (layer.grid_queries, layer.grid_keys) for path, layer in described.items()}
    assert kinds == {
        "model.encoder.layers.0.self_attn": (True, True),
        "model.encoder.layers.1.self_attn": (True, True),
        "model.decoder.layers.0.self_attn": (False, False),
        "model.decoder.layers.0.encoder_attn": (False, True),
    }
    # 64 x 64 pixels at a stride of 16, three object queries, four heads of 16.
    shapes = {path: factors.key.shape for path, factors in tiny_cache.read(0).layers.items()}
    assert shapes["model.decoder.layers.0.encoder_attn"] == (4, 16, 16)
    assert shapes["model.decoder.layers.0.self_attn"] == (4, 3, 16)


def test_size_grows_with_the_cells_and_not_with_their_square(tiny_teacher, tiny_data, tmp_path):
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache")
    record, (layer,) = cache.read(0), cache.recipe.layers
    cells = math.prod(record.grid)
    factors = record.layers[LAST]
    size = sum(tensor.nbytes for tensor in factors)
    # Query and key in two bytes a number, one float32 per row and head.
    assert size == layer.heads * cells * (2 * layer.head_dim * 2 + 4)


def test_augmented_view_is_of_the_image_that_training_makes_again(
    tiny_teacher, tiny_data, tmp_path
):
    options = CacheOptions(dtype="float32", views=3, seed=7)
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache", options)
    item = CocoDetection(tiny_data, "train")[4]
    item["augmentation_seed"] = sample_seed(7, 2, 4)
    live = recorded(tiny_teacher, item, Augmentation())
    torch.testing.assert_close(cache.read(4, 2).layers[LAST].key, live.records[LAST].key[0])
    assert not torch.equal(cache.read(4, 0).layers[LAST].key, cache.read(4, 2).layers[LAST].key)


def test_padding_of_an_image_alone_is_not_kept(tiny_teacher, tiny_data, tmp_path):
    model, processor = load_detector(tiny_teacher)
    processor.pad_size = {"height": 64, "width": 100}
    save_detector(model, processor, tmp_path / "teacher")
    cache = cache_teacher(tmp_path / "teacher", tiny_data, tmp_path / "cache")
    # 64 x 64 pixels on 64 x 100: four of seven columns show the image.
    assert cache.read(0).grid == (4, 4)
    assert cache.read(0).layers[LAST].query.shape == (4, 16, 16)


def test_value_beyond_float16_is_refused_by_name(tiny_teacher, tiny_data, tmp_path):
    model, processor = load_detector(tiny_teacher)
    loud = copy.deepcopy(model)
    loud.get_submodule(LAST).q_proj.bias.data.fill_(1e5)
    save_detector(loud, processor, tmp_path / "teacher")
    with pytest.raises(InputError, match=r"layers\.1.*query reaches .*float16.*--dtype bfloat16"):
        cache_teacher(tmp_path / "teacher", tiny_data, tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of float16"),
        ({"amp": "fp8"}, "amp is 'fp8'"),
        ({"views": 0}, "views is 0"),
        ({"layers": "first"}, "layers='first' is no selection"),
        ({"kinds": ("encoder",)}, "'encoder' is no kind of layer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CacheOptions(**options)


def test_unknown_layer_is_refused_with_a_suggestion(tiny_teacher, tiny_data, tmp_path):
    options = CacheOptions(layers=["model.encoder.layers.7.self_attn"])
    with pytest.raises(InputError, match="did you mean"):
        cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache", options)
    assert not (tmp_path / "cache").exists()
