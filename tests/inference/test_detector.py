"""Boxes come out in pixels of the picture that went in."""

from __future__ import annotations

import PIL.Image
import pytest

pytest.importorskip("transformers")

import torch

from attn_kd import InputError
from attn_kd.inference import Detector
from attn_kd.models import build_image_processor, save_detector


def grey(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.new("L", (width, height), 120)


def test_every_query_is_a_detection_at_threshold_zero(detector):
    (found,) = detector.predict([grey(60, 40)], threshold=0)
    assert len(found) == detector.model.config.num_queries
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert set(found.labels.tolist()) <= set(detector.label_names)


def test_boxes_scale_with_the_picture(detector):
    # Both are resized to the same input, so the model sees no difference.
    small, large = detector.predict([grey(60, 40), grey(180, 120)], threshold=0)
    torch.testing.assert_close(3 * small.boxes, large.boxes)


def test_boxes_stay_within_the_picture(detector):
    (found,) = detector.predict([grey(60, 40)], threshold=0)
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([60, 40, 60, 40])).all()


def test_threshold_keeps_the_better_ones(detector):
    (everything,) = detector.predict([grey(60, 40)], threshold=0)
    middle = everything.scores.median().item()
    (better,) = detector.predict([grey(60, 40)], threshold=middle)
    assert better.scores.tolist() == [s for s in everything.scores.tolist() if s > middle]


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1)])
def test_pictures_of_extreme_shape_are_taken(size, detector):
    keeping_shape = build_image_processor(
        "detr-r50", image_size={"max_height": 64, "max_width": 64}
    )
    (found,) = Detector(detector.model, keeping_shape).predict([grey(*size)], threshold=0)
    assert (found.boxes <= torch.tensor([*size, *size])).all()


def test_pictures_are_prepared_as_the_processor_says(detector):
    picture = PIL.Image.effect_noise((60, 40), 50)
    pixels = detector.processor(images=[picture.convert("RGB")], return_tensors="pt")
    outputs = detector.model(**pixels)
    (expected,) = detector.processor.post_process_object_detection(
        outputs, threshold=0, target_sizes=[(40, 60)]
    )
    (found,) = detector.predict([picture], threshold=0)
    best_first = expected["scores"].argsort(descending=True)
    torch.testing.assert_close(found.scores, expected["scores"][best_first], atol=0.01, rtol=0)


def test_no_pictures_no_detections(detector):
    assert detector.predict([]) == []


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_threshold_outside_its_range_is_refused(threshold, detector):
    with pytest.raises(InputError, match="threshold"):
        detector.predict([grey(8, 8)], threshold=threshold)


def test_saved_detector_finds_the_same(detector, tmp_path):
    save_detector(detector.model, detector.processor, tmp_path / "model")
    loaded = Detector.from_pretrained(tmp_path / "model")
    (expected,) = detector.predict([grey(60, 40)], threshold=0)
    (found,) = loaded.predict([grey(60, 40)], threshold=0)
    assert torch.equal(found.boxes, expected.boxes)
    assert loaded.label_names == {0: "needle"}
