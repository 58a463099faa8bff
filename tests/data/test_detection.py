"""CocoDetection: items of a split."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from attn_kd.data import CocoDetection
from attn_kd.errors import InputError
from tests.data.folders import HEIGHT, WIDTH, document, write_folder


def test_an_item_has_the_image_and_its_objects(tmp_path):
    item = CocoDetection(write_folder(tmp_path, document()), "train")[0]
    assert item["image"].shape == (3, HEIGHT, WIDTH)
    assert item["image"].dtype == torch.uint8
    assert item["image_id"] == 7
    assert item["target"]["boxes"].tolist() == [[4, 6, 14, 14], [20, 3, 25, 12]]
    assert item["target"]["class_labels"].tolist() == [1, 0]
    assert item["short_insertion"] is False


def test_crowd_regions_are_no_targets_but_stay_annotations(tmp_path):
    content = document()
    content["annotations"][0]["iscrowd"] = 1
    dataset = CocoDetection(write_folder(tmp_path, content), "train")
    assert dataset[0]["target"]["class_labels"].tolist() == [0]
    assert len(dataset.annotations(0)) == 2


def test_short_insertions_are_passed_on(tmp_path):
    content = document()
    content["images"][1]["short_insertion"] = True
    dataset = CocoDetection(write_folder(tmp_path, content), "train")
    assert [item["short_insertion"] for item in (dataset[0], dataset[1])] == [False, True]


def test_a_transform_changes_items(tmp_path):
    root = write_folder(tmp_path, document())
    dataset = CocoDetection(root, "train", transform=lambda item: {**item, "image_id": "mine"})
    assert dataset[0]["image_id"] == "mine"


def test_an_image_of_another_size_than_annotated_is_named(tmp_path):
    root = write_folder(tmp_path, document())
    PIL.Image.new("L", (WIDTH + 1, HEIGHT)).save(root / "images" / "a.png")
    with pytest.raises(InputError, match=r"train\.json: image 7 .* 40 x 30 .*a\.png has 41 x 30"):
        CocoDetection(root, "train")[0]


def test_a_truncated_image_is_named(tmp_path):
    root = write_folder(tmp_path, document())
    path = root / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"train\.json: image 9: .*b\.png cannot be read"):
        CocoDetection(root, "train")[1]
