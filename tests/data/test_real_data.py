"""The loader on published data, where ATTN_KD_DATA names the folder that holds it."""

from __future__ import annotations

import pytest
import torch

from attn_kd.data import Augmentation, CocoDetection, DetectionCollator

pytestmark = pytest.mark.data

# Images and classes as the data's README states them.
CASES = [
    ("carotid", "train", 606, ["carotid"]),
    ("carotid", "val", 294, ["carotid"]),
    ("nerve_block", "train", 164, ["nerve", "vessel"]),
    ("nerve_block", "val", 40, ["nerve", "vessel"]),
]


@pytest.mark.parametrize(("name", "split", "count", "categories"), CASES)
def test_a_split_loads_whole(real_data, name, split, count, categories):
    dataset = CocoDetection(real_data / name, split)
    assert len(dataset) == count
    assert dataset.categories == categories
    for index in range(0, count, 20):
        item = dataset[index]
        boxes = item["target"]["boxes"]
        assert len(boxes) >= 1
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert item["image"].float().std() > 5


def test_frames_of_a_recording_are_ordered(real_data):
    entries = CocoDetection(real_data / "carotid", "train").image_entries
    frames: dict[str, list[int]] = {}
    for entry in entries:
        frames.setdefault(entry.extra["recording"], []).append(entry.extra["frame_index"])
    assert all(indices == sorted(indices) for indices in frames.values())


def test_a_batch_for_the_paper_s_detector(real_data):
    models = pytest.importorskip("attn_kd.models")
    dataset = CocoDetection(real_data / "nerve_block", "train")
    collate = DetectionCollator(models.build_image_processor("detr-r50"), Augmentation())
    batch = collate([dataset[index] for index in range(4)])
    assert batch["pixel_values"].shape[:2] == (4, 3)
    assert max(batch["pixel_values"].shape[2:]) == 416
    assert torch.isfinite(batch["pixel_values"]).all()
    for label in batch["labels"]:
        assert ((label["boxes"] >= 0) & (label["boxes"] <= 1)).all()
