"""write_coco: a data folder of simulated clips, whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest

from attn_kd.data import CocoDetection
from attn_kd.data.needle import NeedleSettings, simulate_frames, write_coco
from attn_kd.data.needle.folder import split_seed
from attn_kd.errors import InputError

SMALL = NeedleSettings(size=32, frames=4)


def test_the_loader_reads_back_what_was_simulated(tmp_path):
    root = write_coco(tmp_path / "data", {"train": 20}, seed=5, settings=SMALL)
    frames = simulate_frames(20, seed=split_seed(5, "train"), settings=SMALL)
    dataset = CocoDetection(root, "train")
    assert dataset.categories == ["needle"]
    for index in range(20):
        item = dataset[index]
        difference = item["image"][0].int() - frames.frames[index].int()
        assert difference.abs().max() <= 1
        assert len(item["target"]["boxes"]) == int(frames.has_needle[index])
        assert item["short_insertion"] == bool(frames.is_short[index])
        if frames.has_needle[index]:
            written = item["target"]["boxes"][0]
            assert np.allclose(written, frames.boxes[index], atol=0.02)  # rounded to 1/100


def test_splits_share_no_frame(tmp_path):
    root = write_coco(tmp_path / "data", {"train": 12, "val": 12, "test": 12}, settings=SMALL)
    pictures = {path.read_bytes() for path in (root / "images").iterdir()}
    assert len(pictures) == 36


def test_entries_say_recording_and_frame(tmp_path):
    root = write_coco(tmp_path / "data", {"val": 3}, settings=SMALL)
    entries = [entry.extra for entry in CocoDetection(root, "val").image_entries]
    assert [entry["recording"] for entry in entries] == ["val_000000", "val_000001", "val_000002"]
    assert {entry["frame_index"] for entry in entries} == {SMALL.frames - 1}


def test_whole_clips_list_their_earlier_frames_apart(tmp_path):
    root = write_coco(tmp_path / "data", {"train": 2}, settings=SMALL, whole_clips=True)
    document = json.loads((root / "annotations" / "instances_train.json").read_text())
    assert len(document["images"]) == 2
    places = [(entry["recording"], entry["frame_index"]) for entry in document["unlabeled_images"]]
    assert places == [(f"train_{clip:06d}", frame) for clip in range(2) for frame in range(3)]
    for entry in document["unlabeled_images"] + document["images"]:
        with PIL.Image.open(root / "images" / entry["file_name"]) as image:
            assert image.size == (32, 32)


def test_a_folder_with_content_is_refused_and_left_alone(tmp_path):
    root = write_coco(tmp_path / "data", {"train": 2}, settings=SMALL)
    before = sorted(path.name for path in root.rglob("*"))
    with pytest.raises(InputError, match="data is not empty"):
        write_coco(root, {"val": 2}, settings=SMALL)
    assert sorted(path.name for path in root.rglob("*")) == before


def test_overwriting_replaces_a_data_folder(tmp_path):
    root = write_coco(tmp_path / "data", {"train": 2}, settings=SMALL)
    write_coco(root, {"val": 3}, settings=SMALL, overwrite=True)
    assert [path.name for path in (root / "annotations").iterdir()] == ["instances_val.json"]
    assert len(list((root / "images").iterdir())) == 3


def test_overwriting_replaces_nothing_but_a_data_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        write_coco(tmp_path, {"train": 2}, settings=SMALL, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(clips: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_coco(tmp_path / "data", {"train": 2}, settings=SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_all_clips(tmp_path):
    counts: list[int] = []
    splits = {"train": 20, "val": 3}
    write_coco(tmp_path / "data", splits, settings=SMALL, progress=counts.append)
    assert sum(counts) == 23


@pytest.mark.parametrize("num_clips", [{}, {"train": 0}], ids=["no-split", "no-clip"])
def test_nothing_to_write_is_refused(tmp_path, num_clips):
    with pytest.raises(InputError, match="expected at least"):
        write_coco(tmp_path / "data", num_clips)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        write_coco(tmp_path / "file" / "data", {"train": 1}, settings=SMALL)
