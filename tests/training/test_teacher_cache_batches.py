"""Records of images of several sizes in a batch: padding has no part in the loss."""

import json

import pytest
import torch
from PIL import Image

from attn_kd import AttentionDistiller
from attn_kd.data import CocoDetection, DetectionCollator
from attn_kd.distill import TeacherRecorder
from attn_kd.distill.alignment import resampled_record
from attn_kd.errors import InputError
from attn_kd.models import build_detr, load_backbone_weights, load_detector, save_detector
from attn_kd.training import CacheOptions, cache_teacher
from attn_kd.training.backbone_forward import feature_maps_as_input
from attn_kd.training.feature_cache import FeatureCollator, cache_features
from attn_kd.training.teacher_cache_batches import (
    TEACHER_KEY,
    TaughtCollator,
    padded_to_stride,
    teacher_pass,
)
from tests.tiny_data import write_tiny_data

# Height and width; the processor makes the longer side 96. At a stride of 16 the grids are 6 x 6,
# 3 x 6 (40 rows), 6 x 4 (53 columns) and 2 x 6 (31 rows).
SIZES = [(64, 64), (40, 96), (90, 50), (23, 70)]
GRIDS = [(6, 6), (3, 6), (6, 4), (2, 6)]
LAYERS = {
    "model.encoder.layers.0.self_attn": "model.encoder.layers.1.self_attn",
    "model.decoder.layers.0.self_attn": "model.decoder.layers.0.self_attn",
    "model.decoder.layers.0.encoder_attn": "model.decoder.layers.0.encoder_attn",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_tiny_data(tmp_path_factory.mktemp("mixed") / "data", train=len(SIZES), val=1)
    file = root / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    for entry, (height, width) in zip(document["images"], SIZES, strict=True):
        entry |= {"height": height, "width": width}
        path = root / "images" / entry["file_name"]
        Image.open(path).resize((width, height)).save(path)
    document["annotations"] = []
    file.write_text(json.dumps(document))
    return CocoDetection(root, "train")


@pytest.fixture(scope="module")
def teacher(tiny_teacher, tmp_path_factory):
    model, processor = load_detector(tiny_teacher)
    processor.size = {"max_height": 96, "max_width": 96}
    folder = tmp_path_factory.mktemp("mixed") / "teacher"
    save_detector(model, processor, folder)
    return folder, model, processor


@pytest.fixture(scope="module")
def cache(teacher, dataset, tmp_path_factory):
    root = dataset.image_entries[0].path.parent.parent
    options = CacheOptions(layers=list(LAYERS.values()), dtype="float32")
    return cache_teacher(teacher[0], root, tmp_path_factory.mktemp("mixed") / "cache", options)


@pytest.fixture(scope="module")
def student(teacher):
    """Has the teacher's backbone; dropout is off."""
    torch.manual_seed(1)
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, num_queries=3)
    load_backbone_weights(model, teacher[1])
    return model.eval()


@pytest.fixture(scope="module")
def features(teacher, dataset):
    return cache_features(teacher[1], dataset, [DetectionCollator(teacher[2])], seed=0)


def taught_batch(cache, items, collate, *, features):
    """The student's inputs and the teacher's pass for (index, item) pairs."""
    layers, stride = cache.recipe.layers, cache.recipe.stride
    taught = TaughtCollator(collate, layers, stride, features=features)
    batch = taught([{**item, TEACHER_KEY: cache.read(index)} for index, item in items])
    return teacher_pass(batch, layers)


def distil(teacher, student, batch, given=None):
    """Divergence per layer; `given` stands for the teacher."""
    with (
        torch.no_grad(),
        feature_maps_as_input(teacher, student),
        AttentionDistiller(teacher, student, LAYERS) as distiller,
    ):
        return distiller.run(batch, teacher_pass=given).attention_kl_per_layer


def explicit_kl(query, key, scale, other_query, other_key, other_scale):
    """Mean over heads and rows of KL(student || teacher), by the maps in float64."""
    own, other = (
        (q.double() @ k.double().mT * s).log_softmax(-1)
        for q, k, s in ((query, key, scale), (other_query, other_key, other_scale))
    )
    return (own.exp() * (own - other)).sum(-1)


def test_grid_is_that_of_the_image_alone(cache):
    assert [cache.read(index).grid for index in range(len(SIZES))] == GRIDS


def test_every_image_is_compared_with_its_own_record(teacher, student, dataset, cache):
    """A padded batch of images against explicit maps over the visible cells of each."""
    items = list(enumerate(dataset))
    batch, given = taught_batch(cache, items, DetectionCollator(teacher[2]), features=False)
    measured = distil(teacher[1], student, batch, given)
    batch.pop("labels")
    with TeacherRecorder(student, LAYERS) as record:
        records = record(batch).records
    for own_path, teacher_path in LAYERS.items():
        layer = next(layer for layer in cache.recipe.layers if layer.path == teacher_path)
        own, rows = records[own_path], []
        for index, (height, width) in enumerate(GRIDS):

            def visible(tokens, on_grid, index=index, height=height, width=width):
                if not on_grid:
                    return tokens[index]
                return tokens[index].unflatten(1, (6, 6))[:, :height, :width].flatten(1, 2)

            kept = cache.read(index).layers[teacher_path]
            rows.append(
                explicit_kl(
                    visible(own.query, layer.grid_queries),
                    visible(own.key, layer.grid_keys),
                    own.scale,
                    kept.query,
                    kept.key,
                    layer.scale,
                )
            )
        expected = torch.cat(rows, dim=1).mean()
        torch.testing.assert_close(measured[own_path].double(), expected, rtol=1e-5, atol=1e-8)


def test_records_know_their_padding(teacher, dataset, cache):
    """So that a coarser student's keys do not count the teacher's padded cells (alignment)."""
    collate = DetectionCollator(teacher[2])
    _, given = taught_batch(cache, list(enumerate(dataset)), collate, features=False)
    for own_path, path in LAYERS.items():
        record = given.records[path]
        assert record.mask_known
        if "decoder.layers.0.self_attn" in own_path:
            assert record.attn_mask is None
            continue
        shown = record.attn_mask.unflatten(-1, (6, 6)).squeeze(2).squeeze(1)
        for cells, (height, width) in zip(shown, GRIDS, strict=True):
            assert cells[:height, :width].all() and cells.sum() == height * width


def test_loss_of_an_image_does_not_depend_on_its_batch(teacher, student, features, cache):
    def measured(indices):
        items = [(index, features[index]) for index in indices]
        return distil(
            teacher[1], student, *taught_batch(cache, items, FeatureCollator(), features=True)
        )

    together = measured(range(len(GRIDS)))
    alone = [measured([index]) for index in range(len(GRIDS))]
    for path, mean in together.items():
        # The divergence is a mean over rows: cells in the encoder, object queries in the decoder.
        rows = [h * w if "encoder.layers" in path else 3 for h, w in GRIDS]
        expected = sum(n * one[path] for n, one in zip(rows, alone, strict=True)) / sum(rows)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-8)


def test_teacher_alone_and_in_a_padded_batch_of_features_agree(teacher, student, features, cache):
    """Positions are relative to the visible cells, padding is masked: convolutions alone see it."""
    items = [(index, features[index]) for index in range(len(GRIDS))]
    batch, given = taught_batch(cache, items, FeatureCollator(), features=True)
    cached, live = distil(teacher[1], student, batch, given), distil(teacher[1], student, batch)
    for path, value in cached.items():
        torch.testing.assert_close(value, live[path], rtol=1e-4, atol=1e-7)


def test_records_and_live_teacher_agree_on_a_coarser_grid(teacher, features, cache):
    """Padding holds zeros in a record, something else in a live pass: resampling reads neither."""
    items = [(index, features[index]) for index in range(len(GRIDS))]
    batch, given = taught_batch(cache, items, FeatureCollator(), features=True)
    batch.pop("labels")
    path = LAYERS["model.encoder.layers.0.self_attn"]
    with feature_maps_as_input(teacher[1]), TeacherRecorder(teacher[1], [path]) as recorder:
        live = recorder(batch).records[path]
    cached = given.records[path]
    assert (live.key - cached.key).abs().max() > 0.01  # in the padding
    expected, actual = (
        resampled_record(one, (6, 6), (4, 4), queries_are_tokens=True) for one in (live, cached)
    )
    torch.testing.assert_close(actual.query, expected.query, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.key, expected.key, rtol=1e-4, atol=1e-5)


def test_teacher_output_is_that_of_the_image(teacher, features, cache):
    items = [(index, features[index]) for index in range(len(GRIDS))]
    batch, given = taught_batch(cache, items, FeatureCollator(), features=True)
    batch.pop("labels")
    with torch.no_grad(), feature_maps_as_input(teacher[1]):
        live = teacher[1](**batch)
    torch.testing.assert_close(given.output.logits, live.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.output.pred_boxes, live.pred_boxes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "padded"), [(31, 53), (23, 70), (17, 65), (48, 80), (33, 96)])
def test_image_in_a_batch_shows_as_many_cells_as_alone(rows, padded):
    """Of 53 rows DETR samples 0, 13, 26 and 39: 31 visible ones show three cells, alone two."""
    mask = torch.zeros(2, padded, 16, dtype=torch.int64)
    mask[0, :rows], mask[1] = 1, 1
    batch = padded_to_stride(
        {"pixel_values": torch.zeros(2, 3, padded, 16), "pixel_mask": mask}, 16
    )
    height = -(-padded // 16)
    assert batch["pixel_values"].shape[2:] == (16 * height, 16)
    cells = torch.nn.functional.interpolate(batch["pixel_mask"][None].float(), size=(height, 1))
    assert cells[0, 0, :, 0].sum() == -(-rows // 16)


def test_batch_is_padded_so_that_records_fit(teacher, dataset, cache):
    """40 and 31 rows: padded to 40 DETR would take all three cells of 31 for visible."""
    items = [(index, dataset[index]) for index in (1, 3)]
    batch, given = taught_batch(cache, items, DetectionCollator(teacher[2]), features=False)
    assert batch["pixel_values"].shape == (2, 3, 48, 96)
    record = given.records["model.encoder.layers.1.self_attn"]
    assert record.query.shape == (2, 4, 18, 16)
    assert record.key[1, :, :12].all() and not record.key[1, :, 12:].any()


def test_images_of_one_size_are_not_padded():
    batch = {
        "pixel_values": torch.zeros(2, 3, 50, 60),
        "pixel_mask": torch.ones(2, 50, 60, dtype=torch.int64),
    }
    assert padded_to_stride(batch, 16)["pixel_values"].shape[2:] == (50, 60)


def test_other_cells_than_the_record_has_are_refused(teacher, dataset, cache):
    with pytest.raises(InputError, match="shows 6 x 6 cells in its batch, 3 x 6 in the teacher"):
        taught_batch(cache, [(1, dataset[0])], DetectionCollator(teacher[2]), features=False)
