"""attn-kd eval, from a model and a data folder to figures."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from attn_kd.cli import main
from attn_kd.models import build_detr, build_image_processor, save_detector
from tests.tiny_data import write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_tiny_data(tmp_path_factory.mktemp("data") / "data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    detector = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, id2label={0: "needle"})
    save_detector(detector, build_image_processor("detr-tiny"), folder)
    return str(folder)


def evaluate(model, data, *more):
    return main(["eval", "--model", model, "--data", data, "--device", "cpu", "-q", *more])


def test_figures_are_printed_and_written(model, data, tmp_path, capsys):
    file = tmp_path / "new" / "metrics.json"
    assert evaluate(model, data, "--json", str(file)) == 0
    names = {
        "mAP",
        "mAP50",
        "mAP75",
        "mAP50_short",
        "images_per_second",
        "parameters",
        "macs",
        "num_images",
    }
    metrics = json.loads(file.read_text())
    assert set(metrics) == names
    assert metrics["num_images"] == 6
    captured = capsys.readouterr()
    assert {line.split()[0] for line in captured.out.splitlines()} == names
    assert captured.err == ""


def test_split_is_an_argument(model, data, tmp_path):
    file = tmp_path / "metrics.json"
    assert evaluate(model, data, "--split", "train", "--json", str(file)) == 0
    assert json.loads(file.read_text())["num_images"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--split": "test"}, "instances_test.json does not exist"),
        ({"--model": "nowhere"}, "nowhere is not a model folder"),
        ({"--data": "nowhere"}, "data folder nowhere does not exist"),
        ({"--device": "tpu"}, "--device 'tpu'"),
    ],
    ids=["split", "model", "data", "device"],
)
def test_bad_input_is_one_line(model, data, capsys, changes, message):
    arguments = {"--model": model, "--data": data, **changes}
    assert main(["eval", "-q", *(part for pair in arguments.items() for part in pair)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attn-kd eval: error: ")
    assert message in line


# Python 3.12 and newer warn of fork() in a process with threads; pytest shows what they hide.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_image_found_broken_by_a_loading_process_is_one_line(model, tmp_path, capsys):
    data = write_tiny_data(tmp_path / "data")
    file = data / "images" / "val_004.png"
    file.write_bytes(file.read_bytes()[:200])
    assert evaluate(model, str(data), "--workers", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "val_004.png" in line
    assert "Traceback" not in line


def test_folder_in_place_of_a_file_is_refused_before_anything_is_measured(
    model, data, tmp_path, capsys
):
    assert evaluate(model, data, "--json", str(tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is a folder; expected a file" in captured.err


def test_model_of_other_classes_is_refused(data, tmp_path, capsys):
    detector = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, id2label={0: "nerve"})
    save_detector(detector, build_image_processor("detr-tiny"), tmp_path)
    assert evaluate(str(tmp_path), data) == 2
    assert "detects nerve; the data has needle" in capsys.readouterr().err
