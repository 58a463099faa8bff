"""attn-kd cache-teacher, and attn-kd distill without the teacher."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("transformers")

from attn_kd.cli import main
from attn_kd.models import build_detr, build_image_processor, load_detector, save_detector
from attn_kd.training import TeacherCache, TrainingConfig
from attn_kd.training.records import RunRecord, write_json
from tests.tiny_data import write_tiny_data

SHORT = ["--steps", "2", "--batch-size", "4", "--log-steps", "1", "--device", "cpu", "-q"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_tiny_data(tmp_path_factory.mktemp("data") / "data"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Untrained; two layers of each kind."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    model = build_detr("detr-tiny", encoder_layers=2, decoder_layers=2, id2label={0: "needle"})
    size = {"height": 64, "width": 64}
    save_detector(model, build_image_processor("detr-tiny", image_size=size), folder)
    return str(folder)


@pytest.fixture(scope="module")
def cache(teacher, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    assert cache_teacher(teacher, data, out) == 0
    return str(out)


def cache_teacher(teacher, data, out, *more):
    arguments = ["--teacher", teacher, "--data", data, "--out", str(out), "--device", "cpu", "-q"]
    return main(["cache-teacher", *arguments, *more])


def distill(data, out, *more):
    return main(["distill", "--data", data, "--out", str(out), *SHORT, *more])


def only_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_size_is_told(teacher, data, tmp_path, capsys):
    options = ["--layers", "all", "--kinds", "encoder_self", "decoder_cross"]
    assert cache_teacher(teacher, data, tmp_path / "cache", *options) == 0
    assert capsys.readouterr().out.startswith("12 images, 4 layers, 0.")
    assert cache_teacher(teacher, data, tmp_path / "one") == 0
    assert capsys.readouterr().out.startswith("12 images, 1 layer, 0.")


def test_options_are_arguments(teacher, data, tmp_path):
    layer = "model.encoder.layers.0.self_attn"
    options = ["--layers", layer, "--dtype", "bfloat16", "--split", "val", "--views", "2"]
    options += ["--images-per-shard", "4", "--seed", "3", "--amp", "bf16"]
    assert cache_teacher(teacher, data, tmp_path / "cache", *options) == 0
    recipe = TeacherCache.open(tmp_path / "cache").recipe
    assert [kept.path for kept in recipe.layers] == [layer]
    assert (recipe.dtype, recipe.split, recipe.views) == ("bfloat16", "val", 2)
    assert (recipe.images_per_shard, recipe.seed, recipe.amp) == (4, 3, "bf16")


def test_student_learns_from_the_cache_what_it_does_from_the_teacher(teacher, data, tmp_path):
    """Of layers that are paired by path: the same words for both commands."""
    encoder = "model.encoder.layers.0.self_attn=model.encoder.layers.0.self_attn"
    decoder = "model.decoder.layers.0.encoder_attn=model.decoder.layers.1.encoder_attn"
    layers = ["--layers", encoder, decoder]
    folder = tmp_path / "cache"
    assert cache_teacher(teacher, data, folder, *layers, "--dtype", "float32") == 0
    options = [*layers, "--head-map", "3,2,1,0", "--no-augment", "--amp", "none"]
    assert distill(data, tmp_path / "live", "--teacher", teacher, *options) == 0
    assert distill(data, tmp_path / "cached", "--teacher-cache", str(folder), *options) == 0
    live, cached = (
        json.loads((tmp_path / name / "history.json").read_text())[0] for name in ("live", "cached")
    )
    assert cached["attention_kl"] == pytest.approx(live["attention_kl"], rel=1e-5)


def test_layer_that_is_not_kept_is_refused_with_what_to_keep(cache, data, tmp_path, capsys):
    path = "model.encoder.layers.0.self_attn"
    options = ["--teacher-cache", cache, "--no-augment", "--layers", f"{path}={path}"]
    assert distill(data, tmp_path / "out", *options) == 2
    assert f"expected a cache made with --layers {path}" in only_line(capsys)
    assert not (tmp_path / "out").exists()


def test_student_learns_without_its_teacher(cache, data, tmp_path, capsys):
    assert distill(data, tmp_path / "out", "--teacher-cache", cache, "--no-augment") == 0
    assert "attention KL" in capsys.readouterr().out
    model, processor = load_detector(tmp_path / "out")
    assert (model.config.encoder_layers, model.config.num_queries) == (1, 10)
    assert dict(processor.size) == {"height": 64, "width": 64}


def test_resumed_training_knows_its_cache(cache, data, tmp_path):
    assert distill(data, tmp_path / "out", "--teacher-cache", cache, "--no-augment") == 0
    before = (tmp_path / "out" / "history.json").read_text()
    assert distill(data, tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out" / "history.json").read_text() == before


def test_preset_is_the_teachers(teacher, data, tmp_path, capsys):
    """It stands in the teacher's record, of which the cache has a copy."""
    told = shutil.copytree(teacher, tmp_path / "teacher")
    write_json(told / "training.json", RunRecord(TrainingConfig(preset="detr-r50")).to_dict())
    assert cache_teacher(str(told), data, tmp_path / "cache") == 0
    # A ResNet-50, then, which does not take the weights of this teacher's backbone.
    options = ["--teacher-cache", str(tmp_path / "cache"), "--no-augment"]
    assert distill(data, tmp_path / "out", *options) == 2
    assert "the student's backbone does not match the teacher's" in only_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "nowhere"], "nowhere is not a model folder"),
        (["--split", "test"], "instances_test.json does not exist"),
        (["--layers", "model.encoder"], "is a DetrEncoder, not an attention module"),
        (["--layers", "model.encoder.layers.0.attn"], "did you mean 'model.encoder.layers.0.self"),
        (["--layers", "a", "--kinds", "encoder_self"], "of no use with paths of layers"),
        (["--kinds", "encoder"], "invalid choice: 'encoder'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--views", "0"], "expected a whole number of at least 1"),
    ],
    ids=["teacher", "split", "layer", "path", "kinds of paths", "kind", "dtype", "views"],
)
def test_bad_input_of_the_cache_is_one_line(teacher, data, tmp_path, capsys, arguments, message):
    try:
        code = cache_teacher(teacher, data, tmp_path / "cache", *arguments)
    except SystemExit as stop:  # refused by the parser
        code = stop.code
    assert code == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "cache").exists()


def test_another_cache_in_the_folder_is_one_line(cache, teacher, data, capsys):
    assert cache_teacher(teacher, data, cache, "--dtype", "bfloat16") == 2
    line = only_line(capsys)
    assert "holds another teacher cache: dtype is 'bfloat16', it was" in line
    assert "--overwrite" in line


def test_mismatch_of_a_training_is_one_line(cache, data, tmp_path, capsys):
    assert distill(data, tmp_path / "out", "--teacher-cache", cache) == 2
    assert "augment is True but the teacher cache" in only_line(capsys)


def test_missing_cache_is_one_line(data, tmp_path, capsys):
    assert distill(data, tmp_path / "out", "--teacher-cache", str(tmp_path / "no")) == 2
    assert "no is no complete teacher cache" in only_line(capsys)


def test_damaged_manifest_is_refused_in_one_line(cache, data, tmp_path, capsys):
    copied = shutil.copytree(cache, tmp_path / "cache")
    manifest = copied / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"images_per_shard": 32', '"images_per_shard": 0')
    )
    assert distill(data, tmp_path / "out", "--teacher-cache", str(copied), "--no-augment") == 2
    assert "images_per_shard is 0; expected at least 1" in only_line(capsys)
