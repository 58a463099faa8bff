"""Reading annotation files: what is right is kept, what is wrong is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_kd.data import load_split
from attn_kd.errors import InputError
from tests.data.folders import HEIGHT, WIDTH, document, write_folder

Change = Callable[[dict[str, Any]], object]


def load(root: Path, change: Change = lambda content: None):
    content = document()
    change(content)
    return load_split(write_folder(root, content), "train")


def test_labels_follow_the_order_of_category_ids(tmp_path):
    split = load(tmp_path)
    assert split.category_ids == [2, 5]
    assert split.categories == ["nerve", "vessel"]
    assert split.images[0].annotations.class_labels.tolist() == [1, 0]


def test_category_ids_may_be_numbers_and_strings(tmp_path):
    def change(content):
        content["categories"] += [{"id": "a"}, {"id": 11}]

    assert load(tmp_path, change).category_ids == [2, 5, 11, "a"]


def test_boxes_become_corners(tmp_path):
    boxes = load(tmp_path).images[0].annotations.boxes
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[4, 6, 14, 14], [20, 3, 25, 12]]


def test_an_image_without_annotations_is_a_negative(tmp_path):
    annotations = load(tmp_path).images[1].annotations
    assert len(annotations) == 0
    assert annotations.boxes.shape == (0, 4)


def test_further_keys_of_an_image_are_kept(tmp_path):
    assert load(tmp_path).images[0].extra == {"recording": "r1"}


def test_crowd_regions_are_marked(tmp_path):
    split = load(tmp_path, lambda c: c["annotations"][1].update(iscrowd=1))
    assert split.images[0].annotations.iscrowd.tolist() == [False, True]


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        pytest.param([-6, 2, 20, 8], [0, 2, 14, 10], id="left"),
        pytest.param([30, 25, 40, 40], [30, 25, WIDTH, HEIGHT], id="right-and-below"),
    ],
)
def test_boxes_beyond_the_image_are_clipped_with_one_warning(tmp_path, bbox, expected):
    def change(content):
        content["annotations"][0]["bbox"] = bbox
        content["annotations"][1]["bbox"] = bbox

    with pytest.warns(UserWarning, match=r"clipped 2 boxes .* annotation 1") as caught:
        split = load(tmp_path, change)
    assert len(caught) == 1
    assert split.images[0].annotations.boxes.tolist() == [expected, expected]


def test_boxes_outside_the_image_are_dropped_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="dropped 1 boxes wholly outside"):
        split = load(tmp_path, lambda c: c["annotations"][0].update(bbox=[50, 3, 4, 4]))
    assert len(split.images[0].annotations) == 1


def test_the_first_of_each_kind_of_wrong_box_is_named(tmp_path):
    def change(content):
        content["annotations"][0]["bbox"] = [50, 3, 4, 4]
        content["annotations"][1]["bbox"] = [-6, 2, 20, 8]

    message = r"clipped 1 .*annotation 2\) and dropped 1 .*annotation 1\)"
    with pytest.warns(UserWarning, match=message):
        load(tmp_path, change)


def test_a_rounding_error_at_the_rim_is_clipped_in_silence(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = load(tmp_path, lambda c: c["annotations"][0].update(bbox=[30, 20, 10.4, 10.4]))
    assert split.images[0].annotations.boxes[0].tolist() == [30, 20, WIDTH, HEIGHT]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c["images"].clear(), "lists no image", id="empty-split"),
        pytest.param(lambda c: c["categories"].clear(), "names no category", id="no-category"),
        pytest.param(lambda c: c.pop("annotations"), "'annotations'", id="key-missing"),
        pytest.param(lambda c: c.update(images={"a": 1}), "'images'", id="images-no-list"),
        pytest.param(lambda c: c["images"].append(3), "'images'", id="image-no-object"),
        pytest.param(
            lambda c: c["images"][1].update(id=7), "two image entries .* 7", id="image-id-twice"
        ),
        pytest.param(
            lambda c: c["annotations"][1].update(id=1),
            "two annotation entries .* 1",
            id="annotation-id-twice",
        ),
        pytest.param(
            lambda c: c["categories"][1].update(id=5),
            "two category entries .* 5",
            id="category-id-twice",
        ),
        pytest.param(
            lambda c: c["images"][0].pop("id"), "position 0 has id None", id="image-without-id"
        ),
        pytest.param(
            lambda c: c["images"][0].pop("file_name"), "image 7 has no file_name", id="no-file-name"
        ),
        pytest.param(
            lambda c: c["images"][0].update(width=0), "image 7 has width 0", id="zero-width"
        ),
        pytest.param(
            lambda c: c["images"][0].pop("height"), "image 7 has height None", id="no-height"
        ),
        pytest.param(
            lambda c: c["images"][0].update(file_name="gone.png"),
            "image 7 names .*gone.png",
            id="image-missing",
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(image_id=8),
            "annotation 1 belongs to image 8",
            id="unknown-image",
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(category_id=3),
            "annotation 1 has category 3",
            id="unknown-category",
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(image_id=[7]),
            "annotation 1 belongs",
            id="image-id-a-list",
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]),
            "annotation 1 has bbox",
            id="nan",
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox=[float("inf"), 2, 3, 4]),
            "annotation 1 has bbox",
            id="infinite",
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]),
            "positive width",
            id="negative",
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 0]), "positive width", id="zero"
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "four finite", id="three-numbers"
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox="1 2 3 4"), "four finite", id="text"
        ),
        pytest.param(lambda c: c["annotations"][0].pop("bbox"), "bbox None", id="no-box"),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox=[1, 2, 10**400, 4]),
            "four finite",
            id="beyond-floats",
        ),
        pytest.param(
            lambda c: c["images"][0].update(width=10**400), "image 7 has width", id="huge-width"
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(iscrowd="false"),
            "annotation 1 has iscrowd 'false'",
            id="crowd-a-string",
        ),
        pytest.param(
            lambda c: c["images"][1].update(short_insertion="false"),
            "image 9 has short_insertion 'false'",
            id="short-insertion-a-string",
        ),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path, change)
    assert "instances_train.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        load_split(tmp_path / "nowhere", "train")


def test_a_missing_split_names_those_there_are(tmp_path):
    with pytest.raises(InputError, match=r"instances_val\.json does not exist.*train"):
        load_split(write_folder(tmp_path, document()), "val")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"images": [', id="cut"),
        pytest.param("", id="empty"),
        pytest.param("\x00\x01", id="binary"),
        pytest.param("9" * 5000, id="more-digits-than-python-reads"),
        pytest.param("[" * 100_000, id="nested-too-deep"),
    ],
)
def test_broken_json_is_named(tmp_path, text):
    with pytest.raises(InputError, match=r"instances_train\.json is not valid JSON"):
        load_split(write_folder(tmp_path, text), "train")


def test_a_list_instead_of_a_document_is_refused(tmp_path):
    with pytest.raises(InputError, match="not in COCO format"):
        load_split(write_folder(tmp_path, "[]"), "train")
