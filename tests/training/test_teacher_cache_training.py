"""Distillation from a cache goes as with the teacher that made it, which is not needed for it."""

import json
import shutil

import pytest
from transformers import DetrForObjectDetection

from attn_kd.data import CocoDetection
from attn_kd.errors import InputError
from attn_kd.training import (
    CacheOptions,
    TrainingData,
    TrainingInterrupted,
    cache_teacher,
    distill_detector,
)
from tests.training.test_resume import PressesCtrlC, largest_difference

ALL_KINDS = {"layers": "all", "kinds": ("encoder_self", "decoder_self", "decoder_cross")}
LOSSES = ("loss", "detection_loss", "attention_kl", "class_kl")


@pytest.fixture
def config(tiny_config):
    """Four steps in two epochs on the images as they are."""
    return tiny_config.replace(max_steps=4, augment=False, class_weight=0.5, dropout=0.1)


@pytest.fixture
def distill(tiny_data, tiny_teacher, tiny_cache, tmp_path):
    """Trains a student into a folder, from a cache or with the live teacher."""

    def distill(config, name, cache=None, data=tiny_data, **options):
        teacher = tiny_teacher if cache is None else None
        return distill_detector(
            config, teacher, data, tmp_path / name, device="cpu", teacher_cache=cache, **options
        )

    return distill


def course(run, steps=None):
    """Every logged loss of the steps."""
    return [entry[name] for entry in run.history[:steps] for name in LOSSES if name in entry]


def assert_same_course(run, other, rel=1e-5):
    """Step by step; AdamW makes full steps of small gradients, and more of their rounding."""
    assert course(run, steps=1) == pytest.approx(course(other, steps=1), rel=rel)
    assert course(run) == pytest.approx(course(other), rel=max(rel, 5e-3))
    first, last = (entry["attention_kl"] for entry in (run.history[0], run.history[-1]))
    assert last != pytest.approx(first, rel=2e-2)  # it moves


@pytest.mark.parametrize(
    "changes",
    [
        {**ALL_KINDS, "head_map": (3, 2, 1, 0)},
        {**ALL_KINDS, "head_reduction": "mean"},
        {"freeze_backbone": True},
        {"freeze_backbone": True, "cache_features": True},
        {"teacher_backbone": False, "num_workers": 2},
    ],
    ids=[
        "all layers",
        "head averages",
        "frozen backbone",
        "cached features",
        "own backbone, loading processes",
    ],
)
def test_course_is_that_of_the_live_teacher(config, distill, tiny_cache, changes):
    config = config.replace(**changes)
    assert_same_course(distill(config, "cached", tiny_cache.folder), distill(config, "live"))


def test_course_from_rounded_factors_is_close(config, distill, tiny_teacher, tiny_data, tmp_path):
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "float16")
    # float16 keeps 11 bits.
    assert_same_course(distill(config, "cached", cache.folder), distill(config, "live"), rel=1e-3)


def test_augmented_views_are_those_of_cached_features(
    config, distill, tiny_teacher, tiny_data, tmp_path
):
    options = CacheOptions(dtype="float32", views=3, seed=config.seed)
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "views", options)
    config = config.replace(augment=True, cache_views=3, freeze_backbone=True, cache_features=True)
    live = distill(config, "live")
    assert_same_course(distill(config, "cached", cache.folder), live)
    # Without cached features the same views are made of the images anew in every step.
    config = config.replace(cache_features=False)
    assert_same_course(distill(config, "images", cache.folder), live)


@pytest.fixture
def reordered(tiny_data, tmp_path):
    """The data folder with its training images in reverse."""
    folder = shutil.copytree(tiny_data, tmp_path / "reordered")
    file = folder / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    document["images"].reverse()
    file.write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("cache_features", [False, True], ids=["images", "features"])
def test_augmented_views_of_another_order_are_refused_before_the_folder_is_made(
    config, distill, tiny_teacher, tiny_data, reordered, tmp_path, cache_features
):
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache", CacheOptions(views=2))
    config = config.replace(
        augment=True, freeze_backbone=cache_features, cache_features=cache_features
    )
    with pytest.raises(InputError, match="image 0 of the data is image 11 of the teacher cache"):
        distill(config, "out", cache.folder, reordered)
    assert not (tmp_path / "out").exists()


def test_views_as_they_are_may_come_in_another_order(
    config, distill, tiny_teacher, tiny_data, reordered, tmp_path
):
    options = CacheOptions(dtype="float32", views=2)
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache", options)
    live = distill(config, "live", data=reordered)
    assert_same_course(distill(config, "cached", cache.folder, reordered), live)


def test_teacher_is_neither_there_nor_run(
    config, distill, tiny_teacher, tiny_data, tmp_path, monkeypatch
):
    moved = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    cache = cache_teacher(moved, tiny_data, tmp_path / "cache")
    shutil.rmtree(moved)
    depths = set()
    forward = DetrForObjectDetection.forward

    def noted(model, *arguments, **keywords):
        depths.add(model.config.encoder_layers)
        return forward(model, *arguments, **keywords)

    monkeypatch.setattr(DetrForObjectDetection, "forward", noted)
    run = distill(config, "out", cache.folder)
    assert depths == {1}  # the teacher has two encoder layers
    assert len(run.history) == 4


def test_random_augmentation_is_refused_before_the_folder_is_made(
    config, distill, tiny_cache, tmp_path
):
    with pytest.raises(InputError, match=r"augment is True but the teacher cache .* --no-augment"):
        distill(config.replace(augment=True), "out", tiny_cache.folder)
    assert not (tmp_path / "out").exists()


def test_other_augmentation_is_refused_before_the_folder_is_made(
    config, distill, tiny_teacher, tiny_data, tmp_path
):
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache", CacheOptions(views=2))
    file = cache.folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["recipe"]["augmentation"]["flip"] = 0.25
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=r"augmented with .*'flip': 0\.25.*expected .*'flip': 0\.5"
    ):
        distill(config.replace(augment=True), "out", cache.folder)
    assert not (tmp_path / "out").exists()


def test_other_mixed_precision_is_refused_before_the_folder_is_made(
    config, distill, tiny_teacher, tiny_data, tmp_path
):
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache", CacheOptions(amp="bf16"))
    with pytest.raises(InputError, match=r"amp is 'none' but the teacher .* ran with amp 'bf16'"):
        distill(config, "out", cache.folder)
    assert not (tmp_path / "out").exists()


def test_layer_that_is_not_kept_is_refused_before_the_folder_is_made(
    config, distill, tiny_teacher, tiny_data, tmp_path
):
    cache = cache_teacher(tiny_teacher, tiny_data, tmp_path / "cache")
    with pytest.raises(InputError, match=r"'model\.decoder\.layers\.0\.self_attn' is not in the"):
        distill(config.replace(**ALL_KINDS), "out", cache.folder)
    assert not (tmp_path / "out").exists()


def test_damaged_shard_is_refused_before_the_folder_is_made(config, distill, tiny_cache, tmp_path):
    copied = shutil.copytree(tiny_cache.folder, tmp_path / "cache")
    path = copied / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"shard-00002\.safetensors is damaged"):
        distill(config, "out", copied)
    assert not (tmp_path / "out").exists()


def test_other_data_is_refused_before_the_folder_is_made(
    config, distill, tiny_cache, tiny_data, tmp_path
):
    data = TrainingData(CocoDetection(tiny_data, "val"))
    with pytest.raises(InputError, match="image 1 is val_001"):
        distill(config, "out", tiny_cache.folder, data)
    assert not (tmp_path / "out").exists()


def test_changed_image_is_refused_before_the_folder_is_made(
    config, distill, tiny_cache, tiny_data, tmp_path
):
    changed = shutil.copytree(tiny_data, tmp_path / "data")
    path = changed / "images" / "train_003.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the checksum of the last chunk: the picture is the same, the file not
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train_003\.png\) has another content"):
        distill(config, "out", tiny_cache.folder, TrainingData(CocoDetection(changed, "train")))
    assert not (tmp_path / "out").exists()


def test_stream_of_images_is_refused(config, distill, tiny_cache):
    from attn_kd.data.needle import NeedleStream

    with pytest.raises(InputError, match="of the images of a data folder, not of a stream"):
        distill(config, "out", tiny_cache.folder, TrainingData(NeedleStream()))


def test_teacher_given_beside_must_be_that_of_the_cache(
    config, tiny_cache, tiny_data, tiny_teacher, tmp_path
):
    other = shutil.copytree(tiny_teacher, tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(InputError, match="is of another teacher than"):
        distill_detector(
            config, other, tiny_data, tmp_path / "out", teacher_cache=tiny_cache.folder
        )


def test_no_teacher_and_no_cache_is_refused(config, distill):
    with pytest.raises(InputError, match="teacher is None and so is teacher_cache"):
        distill_detector(config, None, "data", "out")


def test_resumed_training_ends_where_an_uninterrupted_one_does(
    config, distill, tiny_cache, tiny_data
):
    config = config.replace(max_steps=8, eval_steps=3)
    whole = distill(config, "whole", tiny_cache.folder)
    # Interrupted at its first evaluation; the step after that is finished.
    interrupting = TrainingData(CocoDetection(tiny_data, "train"), PressesCtrlC(tiny_data, "val"))
    with pytest.raises(TrainingInterrupted):
        distill(config, "out", tiny_cache.folder, interrupting)
    with pytest.raises(InputError, match=r"the teacher cache is none, it was .*cache \(sha256"):
        distill(config, "out", resume=True)
    resumed = distill(config, "out", tiny_cache.folder, resume=True)
    assert largest_difference(whole.model.state_dict(), resumed.model.state_dict()) < 1e-6
    assert course(resumed) == pytest.approx(course(whole), rel=1e-5)
