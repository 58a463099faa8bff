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


def test_broken_frame_leaves_no_folder(detector, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        write(detector, [tmp_path / "broken.png"], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_without_pictures_there_is_one_file(detector, tmp_path):
    document = write(detector, [save_grey(tmp_path / "a.png")], tmp_path / "out", pictures=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert document["frames"][0]["picture"] is None


def test_earlier_output_is_replaced(detector, tmp_path):
    out = tmp_path / "out"
    write(detector, [save_grey(tmp_path / "a.png")], out)
    write(detector, [save_grey(tmp_path / "b.png")], out)
    assert [path.name for path in (out / "pictures").iterdir()] == ["b.png"]


@pytest.mark.parametrize("earlier_output", [False, True])
def test_foreign_files_among_the_pictures_survive(earlier_output, detector, tmp_path):
    picture = save_grey(tmp_path / "a.png")
    out = tmp_path / "out"
    if earlier_output:
        write(detector, [picture], out)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    (out / "pictures" / "notes.txt").write_text("mine")
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError, match=r"pictures holds notes\.txt"):
        write(detector, [picture], out)
    assert sorted(out.rglob("*")) == before
    assert (out / "pictures" / "notes.txt").read_text() == "mine"


def test_inputs_in_a_folder_called_pictures_survive(detector, tmp_path):
    file = save_grey(tmp_path / "pictures" / "a.png")
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"pictures holds a\.png"):
        write(detector, [file], tmp_path)
    assert file.read_bytes() == before
    assert not (tmp_path / "predictions.json").exists()


def test_pictures_are_not_written_over_their_own_input(detector, tmp_path):
    out = tmp_path / "out"
    write(detector, [save_grey(tmp_path / "a.png")], out)
    before = (out / "pictures" / "a.png").read_bytes()
    with pytest.raises(InputError, match=r"a\.png lies where the pictures"):
        write(detector, [out / "pictures" / "a.png"], out)
    assert (out / "pictures" / "a.png").read_bytes() == before


def test_linked_folder_of_pictures_is_left_alone(detector, tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").symlink_to(tmp_path / "album")
    with pytest.raises(InputError, match="no folder of its own"):
        write(detector, [save_grey(tmp_path / "a.png")], tmp_path / "out")
    assert (tmp_path / "out" / "pictures").is_symlink()


@pytest.mark.parametrize("text", ["no json", "[]", '{"format": "other"}'])
@pytest.mark.parametrize("pictures", [False, True])
def test_foreign_predictions_survive(text, pictures, detector, tmp_path):
    (tmp_path / "predictions.json").write_text(text)
    with pytest.raises(InputError, match=r"predictions\.json was not written by"):
        write(detector, [save_grey(tmp_path / "a.png")], tmp_path, pictures=pictures)
    assert (tmp_path / "predictions.json").read_text() == text
