"""Which frames a report shows."""

from __future__ import annotations

import json
from collections import Counter

import PIL.Image
import pytest

pytest.importorskip("transformers")

from attn_kd.data import CocoDetection
from attn_kd.report.samples import draw_samples


@pytest.fixture
def dataset(tmp_path):
    """Ten frames, each of its own grey: 0-5 empty, 6-8 with an object, 9 a short insertion."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    images, annotations = [], []
    for number in range(10):
        PIL.Image.new("L", (20, 10), number).save(tmp_path / "images" / f"{number}.png")
        entry = {"id": number, "file_name": f"{number}.png", "width": 20, "height": 10}
        images.append({**entry, "short_insertion": number == 9})
        if number > 5:
            box = {"bbox": [2, 3, 4, 5], "area": 20, "iscrowd": 0, "category_id": 1}
            annotations.append({**box, "id": number, "image_id": number})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "needle"}]
    (tmp_path / "annotations" / "instances_test.json").write_text(json.dumps(content))
    return CocoDetection(tmp_path, "test")


def numbers(samples):
    return [sample.image.getpixel((0, 0))[0] for sample in samples]


def test_every_kind_is_drawn(dataset):
    kinds = Counter(sample.caption for sample in draw_samples(dataset, 5, seed=0))
    assert kinds == {"short insertion": 1, "with object": 2, "without object": 2}


def test_samples_have_their_boxes(dataset):
    drawn = draw_samples(dataset, 10, seed=0)
    by_number = dict(zip(numbers(drawn), drawn, strict=True))
    assert by_number[7].boxes == [[2, 3, 6, 8]]
    assert by_number[1].boxes == []


def test_seed_decides_the_draw(dataset):
    draws = {tuple(numbers(draw_samples(dataset, 4, seed=seed))) for seed in range(10)}
    assert len(draws) > 1
    first, again = (numbers(draw_samples(dataset, 4, seed=3)) for _ in range(2))
    assert first == again


def test_small_split_is_shown_whole(dataset):
    assert sorted(numbers(draw_samples(dataset, 99, seed=0))) == list(range(10))
