import math

import pytest
import torch
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from attn_kd.data import CocoDetection
from attn_kd.errors import InputError
from attn_kd.models import build_detr, build_image_processor, count_macs, count_parameters
from attn_kd.training import attention_divergence, detection_metrics, evaluate_detector


@pytest.fixture(scope="module")
def val(tiny_data):
    return CocoDetection(tiny_data, "val")


@pytest.fixture(scope="module")
def processor():
    return build_image_processor("detr-tiny", image_size={"height": 64, "width": 64})


def detector(layers=1, **options):
    torch.manual_seed(layers)
    options.setdefault("id2label", {0: "needle"})
    return build_detr("detr-tiny", encoder_layers=layers, decoder_layers=1, **options)


class Oracle(torch.nn.Module):
    """Knows the boxes of a split; fires on empty images too if it is careless."""

    def __init__(self, dataset, *, careless=False):
        super().__init__()
        self.config = detector().config
        self.device = torch.device("cpu")
        self.anything = torch.nn.Parameter(torch.zeros(()))
        self.dataset = dataset
        self.careless = careless
        self.seen = 0

    def forward(self, pixel_values, pixel_mask):
        logits = torch.full((len(pixel_values), 1, 2), -4.0)
        boxes = torch.full((len(pixel_values), 1, 4), 0.5)
        for row in range(len(pixel_values)):
            objects = self.dataset.annotations(self.seen)
            self.seen += 1
            if len(objects) or self.careless:
                # Surest, if careless, where there is nothing.
                logits[row, 0, 0] = 4.0 if len(objects) else 6.0
            if len(objects):
                low, high = objects.boxes[0, :2] / 64, objects.boxes[0, 2:] / 64
                boxes[row, 0] = torch.cat([(low + high) / 2, high - low])
        return DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)


def test_perfect_detector_reaches_one(val, processor):
    metrics = detection_metrics(Oracle(val), processor, val, batch_size=4)
    expected = {"mAP": 1.0, "mAP50": 1.0, "mAP75": 1.0, "mAP50_short": 1.0}
    assert metrics == pytest.approx(expected)


def test_short_insertions_are_measured_against_all_negatives(val, processor):
    # Of six pictures 3 and 6 are empty and 4 is short. The careless detector's false positives on
    # the two come first: precision is 4/6 over all positives, 1/3 over the one that is short.
    metrics = detection_metrics(Oracle(val, careless=True), processor, val)
    assert metrics["mAP50"] == pytest.approx(4 / 6, abs=1e-6)
    assert metrics["mAP50_short"] == pytest.approx(1 / 3, abs=1e-6)


class _Unmarked(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset
        self.categories, self.annotations = dataset.categories, dataset.annotations

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return {k: v for k, v in self.dataset[index].items() if k != "short_insertion"}


def test_data_without_marks_has_no_figure_for_short_insertions(val, processor):
    assert "mAP50_short" not in detection_metrics(Oracle(val), processor, _Unmarked(val))


def test_figures_do_not_depend_on_the_batch(val, processor):
    model = detector()
    whole, single = (detection_metrics(model, processor, val, batch_size=size) for size in (6, 1))
    assert whole == pytest.approx(single, abs=1e-6)


def test_all_figures_are_there(val, processor):
    model = detector()
    metrics = evaluate_detector(model, processor, val)
    assert metrics["images_per_second"] > 0
    assert metrics["parameters"] == count_parameters(model)
    assert metrics["macs"] == count_macs(model, (64, 64))
    assert metrics["num_images"] == 6
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(val, processor, training):
    model = detector().train(training)
    evaluate_detector(model, processor, val)
    assert model.training is training


def test_other_classes_are_refused(val, processor):
    model = detector(id2label={0: "nerve", 1: "vessel"}, num_labels=2)
    with pytest.raises(InputError, match="the model detects nerve, vessel; the data has needle"):
        detection_metrics(model, processor, val)


def test_attention_is_no_way_from_that_of_the_same_weights(val, processor):
    assert attention_divergence(detector(), detector(), processor, val) == pytest.approx(
        0, abs=1e-6
    )


class _OfTwoSizes(torch.utils.data.Dataset):
    """Every other image is cut to half its height."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.categories, self.annotations = dataset.categories, dataset.annotations

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = self.dataset[index]
        return {**item, "image": item["image"][:, :32]} if index % 2 else item


def test_attention_divergence_does_not_depend_on_the_batch(val):
    # This preset keeps the shape of an image, so that images of two sizes make padding.
    processor = build_image_processor("detr-r50", image_size={"max_height": 64, "max_width": 64})
    teacher, student = detector(2), detector(1)
    for model in (teacher, student):
        for parameter in model.model.encoder.parameters():
            parameter.data *= 4  # so that maps are far from uniform
    images = _OfTwoSizes(val)
    together = attention_divergence(teacher, student, processor, images, batch_size=4)
    alone = attention_divergence(teacher, student, processor, images, batch_size=1)
    assert together > 0.01
    assert together == pytest.approx(alone, rel=1e-4)


def test_mode_of_each_module_is_restored(val, processor):
    model = detector().train()
    model.model.backbone.eval()
    attention_divergence(detector(2), model, processor, val)
    assert model.model.encoder.training
    assert not any(module.training for module in model.model.backbone.modules())
