import contextlib
import io
import math

import numpy as np
import pytest

from attn_kd.training.coco_metrics import LabelledBoxes, average_precision

pytest.importorskip("faster_coco_eval")


def boxes(*corners, labels=None, scores=None):
    count = len(corners)
    return LabelledBoxes(
        np.array(corners, dtype=np.float64).reshape(count, 4),
        np.zeros(count, int) if labels is None else np.array(labels),
        None if scores is None else np.array(scores),
    )


NOTHING = boxes(scores=[])


def random_scene(generator, *, num_classes, with_scores):
    count = generator.integers(0, 6)
    corner = generator.uniform(0, 60, (count, 2))
    scores = generator.uniform(size=count) if with_scores else None
    return LabelledBoxes(
        np.concatenate([corner, corner + generator.uniform(20, 60, (count, 2))], axis=1),
        generator.integers(0, num_classes, count),
        scores,
    )


def test_exact_detections_reach_one():
    truth = [boxes([0, 0, 10, 10]), boxes()]
    found = [boxes([0, 0, 10, 10], scores=[0.9]), NOTHING]
    precision = average_precision(truth, found, num_classes=1)
    assert (precision.mean, precision.at_50, precision.at_75) == pytest.approx((1, 1, 1))


def test_overlap_of_half_counts_only_up_to_that_threshold():
    # IoU of [0,10]² and [0,10]x[0,6] is 0.6: three of COCO's ten thresholds (0.50, 0.55, 0.60).
    precision = average_precision(
        [boxes([0, 0, 10, 10])], [boxes([0, 0, 10, 6], scores=[1.0])], num_classes=1
    )
    assert precision.at_50 == pytest.approx(1)
    assert precision.at_75 == pytest.approx(0)
    assert precision.mean == pytest.approx(0.3)


def test_surer_false_positive_in_an_empty_image_costs_half():
    # Ranked by score the false positive comes first: precision 1/2 at every recall.
    truth = [boxes([0, 0, 10, 10]), boxes()]
    found = [boxes([0, 0, 10, 10], scores=[0.5]), boxes([0, 0, 10, 10], scores=[0.9])]
    assert average_precision(truth, found, num_classes=1).at_50 == pytest.approx(0.5)


def test_no_detection_at_all_is_zero():
    assert average_precision([boxes([0, 0, 9, 9])], [NOTHING], num_classes=1).at_50 == 0


def test_without_ground_truth_it_is_undefined():
    precision = average_precision([boxes()], [boxes([0, 0, 9, 9], scores=[0.5])], num_classes=1)
    assert math.isnan(precision.mean) and math.isnan(precision.at_50)


def test_class_that_does_not_occur_does_not_count():
    truth = [boxes([0, 0, 10, 10], labels=[1])]
    found = [boxes([0, 0, 10, 10], labels=[1], scores=[0.9])]
    assert average_precision(truth, found, num_classes=3).at_50 == pytest.approx(1)


def test_detection_in_a_crowd_region_is_not_held_against_the_detector():
    truth = LabelledBoxes(
        np.array([[0, 0, 10, 10], [20, 20, 80, 80.0]]), np.zeros(2, int), crowd=np.array([0, 1])
    )
    found = boxes([30, 30, 60, 60], [0, 0, 10, 10], scores=[0.9, 0.5])
    assert average_precision([truth], [found], num_classes=1).at_50 == pytest.approx(1)


def test_equals_pycocotools():
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    from attn_kd.training.coco_metrics import _coco_dictionary, _coco_results

    generator = np.random.default_rng(0)
    truth = [random_scene(generator, num_classes=2, with_scores=False) for _ in range(30)]
    found = [random_scene(generator, num_classes=2, with_scores=True) for _ in range(30)]
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = coco.COCO()
        annotated.dataset = _coco_dictionary(truth, 2)
        annotated.createIndex()
        # What pycocotools insists on in results made of plain numbers.
        annotated.dataset["info"] = {}
        evaluation = cocoeval.COCOeval(
            annotated, annotated.loadRes(list(_coco_results(found))), "bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = average_precision(truth, found, num_classes=2)
    assert 0 < evaluation.stats[1] < 1
    assert (precision.mean, precision.at_50, precision.at_75) == pytest.approx(
        tuple(evaluation.stats[:3]), abs=1e-12
    )


def test_prints_nothing(capfd):
    average_precision([boxes([0, 0, 9, 9])], [boxes([0, 0, 9, 9], scores=[1.0])], num_classes=1)
    assert capfd.readouterr() == ("", "")


def test_images_must_correspond():
    with pytest.raises(ValueError, match="2 images of ground truth, 1 of detections"):
        average_precision([boxes(), boxes()], [NOTHING], num_classes=1)
