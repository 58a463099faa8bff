"""attn-kd predict, from a model folder and files to boxes."""

from __future__ import annotations

import json

import PIL.Image
import pytest

pytest.importorskip("transformers")

from attn_kd.cli import main
from attn_kd.models import build_detr, build_image_processor, save_detector


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, id2label={0: "needle"})
    save_detector(model, build_image_processor("detr-tiny"), folder)
    return folder


def test_folder_of_pictures_and_animations(model, tmp_path, capsys):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    still = PIL.Image.new("L", (40, 30))
    still.save(inputs / "a.png")
    still.save(inputs / "b.tiff", save_all=True, append_images=[still, still])
    out = tmp_path / "out"
    assert main(["predict", "--model", str(model), str(inputs), "--out", str(out)]) == 0
    frames = json.loads((out / "predictions.json").read_text())["frames"]
    assert [frame["frame"] for frame in frames] == [None, 0, 1, 2]
    assert len(list((out / "pictures").iterdir())) == 4
    assert "in 4 frames" in capsys.readouterr().out


def test_broken_picture_ends_in_one_line(model, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments = ["predict", "--model", str(model), str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken.png" in line
    assert not (tmp_path / "out").exists()


def test_pictures_of_the_user_are_never_replaced(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").mkdir()
    PIL.Image.new("L", (40, 30)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "--model", str(model), "pictures", "--out", "."]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pictures holds a.png" in line
    assert {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == before


def test_broken_model_ends_in_one_line(model, tmp_path, capsys):
    broken = tmp_path / "model"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"cut off")
    PIL.Image.new("L", (40, 30)).save(tmp_path / "a.png")
    arguments = ["predict", "--model", str(broken), str(tmp_path / "a.png")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(broken) in line
