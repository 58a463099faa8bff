"""attn-kd distill, from a teacher and a data folder to a student."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("transformers")

from attn_kd.cli import main
from attn_kd.models import load_detector
from attn_kd.training import TrainingConfig
from tests.tiny_data import write_tiny_data

STUDENT_LAYER = "model.encoder.layers.0.self_attn"
SHORT = ["--steps", "2", "--batch-size", "4", "--log-steps", "1", "--device", "cpu", "-q"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_tiny_data(tmp_path_factory.mktemp("data") / "data"))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("teacher") / "teacher")
    layers = ["--encoder-layers", "2", "--decoder-layers", "2", "--num-queries", "3"]
    size = ["--image-size", "64", "--pretrain-steps", "0"]
    assert main(["train", "--data", data, "--out", out, *layers, *size, *SHORT]) == 0
    return out


@pytest.fixture(scope="module")
def plain(teacher, data, tmp_path_factory):
    """A student of the last layer."""
    out = tmp_path_factory.mktemp("plain") / "plain"
    assert distill(teacher, data, out) == 0
    return out


def distill(teacher, data, out, *more):
    return main(["distill", "--teacher", teacher, "--data", data, "--out", str(out), *SHORT, *more])


def test_student_is_shallow_and_otherwise_like_its_teacher(teacher, data, tmp_path, capsys):
    assert distill(teacher, data, tmp_path / "out") == 0
    assert "attention KL" in capsys.readouterr().out
    model, processor = load_detector(tmp_path / "out")
    assert (model.config.encoder_layers, model.config.decoder_layers) == (1, 1)
    assert model.config.num_queries == 3
    assert dict(processor.size) == {"height": 64, "width": 64}


def test_layers_and_alpha_are_arguments(teacher, data, tmp_path):
    options = ["--encoder-layers", "2", "--decoder-layers", "1", "--alpha", "0.25"]
    options += ["--class-weight", "0"]
    assert distill(teacher, data, tmp_path / "out", *options) == 0
    assert load_detector(tmp_path / "out")[0].config.encoder_layers == 2
    entry = json.loads((tmp_path / "out" / "history.json").read_text())[0]
    mixed = 0.75 * entry["detection_loss"] + 0.25 * entry["attention_kl"]
    assert entry["loss"] == pytest.approx(mixed, rel=1e-5)


def test_what_is_compared_and_how_are_arguments(teacher, data, tmp_path):
    plain, other = tmp_path / "plain", tmp_path / "other"
    size = ["--encoder-layers", "2", "--decoder-layers", "2"]
    assert distill(teacher, data, plain, *size) == 0
    options = ["--layers", "all", "--kinds", "encoder_self", "decoder_cross"]
    options += ["--divergence", "forward_kl", "--head-map", "3,2,1,0"]
    options += ["--teacher-grid", "4x4", "--student-grid", "4x4"]
    assert distill(teacher, data, other, *size, *options, "--alignment", "resample") == 0
    record = json.loads((other / "training.json").read_text())
    config = TrainingConfig.from_dict(record["config"])
    assert config.distiller_options == {
        "layers": "all",
        "kinds": ("encoder_self", "decoder_cross"),
        "divergence": "forward_kl",
        "head_reduction": "none",
        "head_map": (3, 2, 1, 0),
        "alignment": "resample",
        "teacher_grid": (4, 4),
        "student_grid": (4, 4),
    }
    first = [json.loads((out / "history.json").read_text())[0] for out in (plain, other)]
    assert first[0]["attention_kl"] != pytest.approx(first[1]["attention_kl"], rel=1e-3)


def history(out):
    return json.loads((out / "history.json").read_text())


def test_layers_may_be_pairs_of_paths(teacher, data, plain, tmp_path):
    for name, number in {"first": 0, "last": 1}.items():
        pair = f"{STUDENT_LAYER}=model.encoder.layers.{number}.self_attn"
        assert distill(teacher, data, tmp_path / name, "--layers", pair) == 0
    assert history(tmp_path / "last") == history(plain)
    assert history(tmp_path / "first") != history(plain)


def test_head_map_may_be_of_one_layer(teacher, data, plain, tmp_path):
    for name, head_map in {"all": "3,2,1,0", "one": f"{STUDENT_LAYER}=3,2,1,0"}.items():
        assert distill(teacher, data, tmp_path / name, "--head-map", head_map) == 0
    assert history(tmp_path / "one") == history(tmp_path / "all")
    assert history(tmp_path / "one") != history(plain)


def test_explicit_layers_and_heads_are_the_settings_that_a_run_resumes_with(
    teacher, data, tmp_path, capsys
):
    pair = f"{STUDENT_LAYER}=model.encoder.layers.0.self_attn"
    options = ["--layers", pair, "--head-map", f"{STUDENT_LAYER}=3,2,1,0"]
    out = tmp_path / "out"
    assert distill(teacher, data, out, *options) == 0
    assert distill(teacher, data, out, *options, "--resume") == 0
    assert distill(teacher, data, out, "--resume") == 0
    capsys.readouterr()
    assert distill(teacher, data, out, "--resume", "--layers", "last") == 2
    assert "layers is 'last', it was {'model.encoder." in capsys.readouterr().err


def test_a_student_is_not_resumed_without_its_teacher(plain, data, capsys):
    assert main(["train", "--data", data, "--out", str(plain), "--resume", "-q"]) == 2
    assert f"{plain} was trained with a teacher; resume it with" in capsys.readouterr().err


def edit_settings(folder, edit):
    """Change the settings in the record of a run."""
    path = folder / "training.json"
    record = json.loads(path.read_text())
    edit(record["config"])
    path.write_text(json.dumps(record))


def make_old(config):
    """As records were before kinds had their name and grids could be given."""
    config["layer_kinds"] = config.pop("kinds")
    del config["teacher_grid"], config["student_grid"]


def test_records_of_an_earlier_version(teacher, data, tmp_path, capsys):
    old, out = tmp_path / "old", tmp_path / "out"
    shutil.copytree(teacher, old)
    edit_settings(old, make_old)
    assert distill(str(old), data, out, "--kinds", "decoder_self") == 0
    edit_settings(out, make_old)
    assert distill(str(old), data, out, "--resume", "--kinds", "decoder_self") == 0
    capsys.readouterr()
    assert distill(str(old), data, out, "--resume", "--kinds", "encoder_self") == 2
    assert "kinds is ('encoder_self',), it was ('decoder_self',)" in capsys.readouterr().err


def test_argument_overrides_a_setting_of_former_name(teacher, data, plain, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"layer_kinds": ["decoder_self"]}')
    options = ["--resume", "--config", str(file)]
    assert distill(teacher, data, plain, *options, "--kinds", "encoder_self") == 0
    assert distill(teacher, data, plain, *options) == 2


def test_record_with_a_setting_that_is_refused_is_named(teacher, data, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    edit_settings(broken, lambda config: config.update(alpha=2.0))
    assert distill(str(broken), data, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{broken / 'training.json'}: alpha is 2.0; expected" in line


def test_occupied_folder_is_refused_with_the_ways_out(teacher, data, plain, capsys):
    assert distill(teacher, data, plain) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(plain) in line and "--resume" in line and "--overwrite" in line


def test_features_are_cached_in_a_folder_that_serves_the_next_run(teacher, data, tmp_path):
    options = ["--freeze-backbone", "--cache-features", "--feature-dir", str(tmp_path / "features")]
    assert distill(teacher, data, tmp_path / "distilled", *options) == 0
    files = sorted((tmp_path / "features").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 12  # one per training picture
    assert distill(teacher, data, tmp_path / "baseline", *options, "--alpha", "0") == 0
    assert sorted((tmp_path / "features").rglob("*.safetensors")) == files
    assert [file.stat().st_mtime_ns for file in files] == times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--teacher is missing"),
        (["--teacher", "nowhere"], "nowhere is not a model folder"),
        (["--alpha", "1.5"], "expected a number from 0 to 1"),
        (["--kinds", "encoder"], "invalid choice: 'encoder'"),
        (["--resume", "--overwrite"], "not allowed with argument --resume"),
    ],
    ids=["no teacher", "no such teacher", "alpha", "kind", "resume and overwrite"],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, arguments, message):
    out = str(tmp_path / "out")
    try:
        code = main(["distill", "--data", data, "--out", out, *SHORT, *arguments])
    except SystemExit as stop:  # refused by the parser
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "first"], "--layers 'first' is no pair of layers; expected last or all"),
        (
            ["--layers", "model.encoder.layers.0.attn=model.encoder.layers.0.self_attn"],
            f"student has no layer 'model.encoder.layers.0.attn'; did you mean '{STUDENT_LAYER}'",
        ),
        (
            ["--layers", f"{STUDENT_LAYER}=model.encoder.layers.2"],
            "teacher has no layer 'model.encoder.layers.2'; did you mean 'model.encoder.layers.",
        ),
        (["--layers", f"{STUDENT_LAYER}={STUDENT_LAYER}", "--kinds", "encoder_self"], "of no use"),
        (["--head-map", "0,1,2,9"], "names head 9"),
        (["--head-map", "0,1"], "is for 2 heads, student layer"),
        (["--head-map", "model.encoder=0,1,2,3"], "names 'model.encoder', which is not distilled"),
        (["--head-map", "0", "--head-reduction", "mean"], "averages heads"),
        (["--teacher-grid", "3x3"], "teacher_grid=(3, 3) has 9 tokens"),
        (["--kinds", "decoder_self", "decoder_self"], "each once"),
        # Its backbone has twice the stride of the teacher's.
        (["--preset", "detr-r50", "--own-backbone"], 'alignment="resample" or "group"'),
    ],
    ids=[
        "layers",
        "student path",
        "teacher path",
        "kinds of paths",
        "head",
        "heads",
        "layer of heads",
        "averaged",
        "grid that was given",
        "kinds",
        "grid",
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(
    teacher, data, tmp_path, capsys, arguments, message
):
    out = tmp_path / "out"
    assert distill(teacher, data, out, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()
