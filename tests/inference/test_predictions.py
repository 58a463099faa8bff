"""The files that predict writes."""

from __future__ import annotations

import json

import PIL.Image
import pytest

pytest.importorskip("transformers")

from attn_kd import InputError
from attn_kd.inference.frames import iter_frames
from attn_kd.inference.predictions import write_predictions


def save_grey(file, width=60, height=40):
    file.parent.mkdir(exist_ok=True)
    PIL.Image.new("L", (width, height), 120).save(file)
    return file


def write(detector, files, out, **options):
    out.mkdir(exist_ok=True)
    return write_predictions(detector, iter_frames(files), out, model_name="m", **options)


def test_file_holds_what_the_detector_found(detector, tmp_path):
    file = save_grey(tmp_path / "a.png")
    write(detector, [file], tmp_path / "out", threshold=0)
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert document["labels"] == {"0": "needle"}
    (frame,) = document["frames"]
    assert (frame["source"], frame["frame"]) == (str(file), None)
    assert (frame["width"], frame["height"]) == (60, 40)
    (found,) = detector.predict([PIL.Image.open(file)], threshold=0)
    assert [one["score"] for one in frame["detections"]] == pytest.approx(found.scores, abs=1e-4)
    assert frame["detections"][0]["box"] == pytest.approx(found.boxes[0].tolist(), abs=0.01)
    assert frame["detections"][0]["name"] == "needle"


def test_every_frame_has_its_picture(detector, tmp_path):
    files = [save_grey(tmp_path / folder / "same.png") for folder in ("one", "two")]
    document = write(detector, files, tmp_path / "out")
    pictures = [frame["picture"] for frame in document["frames"]]
    assert pictures == ["pictures/same.png", "pictures/same-2.png"]
    assert all((tmp_path / "out" / picture).is_file() for picture in pictures)


def test_batches_do_not_change_the_order(detector, tmp_path):
    files = [save_grey(tmp_path / f"{n}.png", width=30 + n) for n in range(5)]
    document = write(detector, files, tmp_path / "out", batch_size=2)
    assert [frame["width"] for frame in document["frames"]] == [30, 31, 32, 33, 34]


def test_broken_frame_leaves_earlier_output_alone(detector, tmp_path):
    good = save_grey(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    write(detector, [good], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"broken\.png"):
        write(detector, [good, tmp_path / "broken.png"], out)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert after == before


def test_without_pictures_there_is_one_file(detector, tmp_path):
    document = write(detector, [save_grey(tmp_path / "a.png")], tmp_path / "out", pictures=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert document["frames"][0]["picture"] is None
