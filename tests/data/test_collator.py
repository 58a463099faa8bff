"""DetectionCollator: the batch that transformers' processor would make, with boxes that fit."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from attn_kd.data import Augmentation, DetectionCollator
from attn_kd.errors import InputError

transformers = pytest.importorskip("transformers")

SIZES = {
    "fixed": {"height": 48, "width": 40},
    "limits": {"max_height": 50, "max_width": 50},
    "edges": {"shortest_edge": 40, "longest_edge": 70},
}


def item(height: int, width: int, image_id: int = 0, grey: bool = False, **extra):
    generator = torch.Generator().manual_seed(image_id)
    channels = 1 if grey else 3
    coarse = torch.rand(1, channels, 6, 5, generator=generator) * 255
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    boxes = torch.tensor([[0.25 * width, 0.5 * height, 0.75 * width, 1.0 * height]])
    target = {"boxes": boxes, "class_labels": torch.tensor([1])}
    pixels = image.to(torch.uint8)
    pixels = pixels[0].expand(3, height, width) if grey else pixels
    return {"image": pixels, "target": target, "image_id": image_id, **extra}


def processor(**options):
    return transformers.DetrImageProcessorPil(**options)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_pixels_equal_those_of_the_processor(size, grey):
    items = [item(37, 61, 1, grey), item(64, 33, 2, grey)]
    reference = processor(size=size)
    pictures = [PIL.Image.fromarray(i["image"].permute(1, 2, 0).numpy()) for i in items]
    expected = reference(images=pictures, return_tensors="pt")
    batch = DetectionCollator(reference)(items)
    # Bilinear interpolation in integers may differ from Pillow's by one grey level of 255.
    one_level = 1.01 / 255 / min(reference.image_std)
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_mask"], expected["pixel_mask"])
    assert (batch["pixel_values"] - expected["pixel_values"]).abs().max() <= one_level


def test_padding_is_masked_and_black_after_normalisation():
    batch = DetectionCollator(processor(size=SIZES["limits"]))([item(50, 50), item(25, 50)])
    assert batch["pixel_mask"].dtype == torch.int64
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [2500, 1250]
    assert not batch["pixel_values"][1][:, batch["pixel_mask"][1] == 0].any()


def test_pad_size_fixes_the_size_of_the_batch():
    options = {"size": SIZES["limits"], "pad_size": {"height": 64, "width": 80}}
    batch = DetectionCollator(processor(**options))([item(25, 50)])
    assert batch["pixel_values"].shape == (1, 3, 64, 80)


def test_boxes_are_relative_to_the_image_without_padding():
    batch = DetectionCollator(processor(size=SIZES["limits"]))([item(50, 50), item(25, 50)])
    for label in batch["labels"]:
        assert label["boxes"].dtype == torch.float32
        assert label["boxes"].tolist() == [[0.5, 0.75, 0.5, 0.5]]


def test_post_processing_gives_the_boxes_back():
    reference = processor(size=SIZES["limits"])
    items = [item(60, 90, 1), item(31, 44, 2)]
    labels = DetectionCollator(reference)(items)["labels"]
    outputs = transformers.models.detr.modeling_detr.DetrObjectDetectionOutput(
        logits=torch.tensor([[[0.0, 9.0, 0.0]]]).expand(2, 1, 3),
        pred_boxes=torch.stack([label["boxes"] for label in labels]),
    )
    sizes = torch.stack([label["orig_size"] for label in labels])
    found = reference.post_process_object_detection(outputs, threshold=0.5, target_sizes=sizes)
    for result, source in zip(found, items, strict=True):
        torch.testing.assert_close(result["boxes"], source["target"]["boxes"])


def test_negatives_have_empty_labels():
    negative = item(20, 20)
    negative["target"] = {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0).long()}
    (label,) = DetectionCollator(processor(size=SIZES["fixed"]), Augmentation())([negative])[
        "labels"
    ]
    assert label["boxes"].shape == (0, 4)
    assert label["class_labels"].shape == (0,)


def test_an_augmentation_seed_decides_alone():
    collate = DetectionCollator(processor(size=SIZES["fixed"]), Augmentation())
    one = item(60, 80, 1, augmentation_seed=11)
    alone = collate([one])
    torch.rand(5)
    together = collate([item(60, 80, 2, augmentation_seed=12), one])
    assert torch.equal(alone["pixel_values"][0], together["pixel_values"][1])
    other = collate([{**one, "augmentation_seed": 13}])
    assert not torch.equal(alone["pixel_values"], other["pixel_values"])


def test_without_its_augmentation_seed_an_item_is_left_as_it_is():
    reference = processor(size=SIZES["fixed"])
    items = [item(37, 61, augmentation_seed=None)]
    augmenting = DetectionCollator(reference, Augmentation())(items)
    plain = DetectionCollator(reference)(items)
    assert torch.equal(augmenting["pixel_values"], plain["pixel_values"])


def test_the_original_size_survives_augmentation():
    collate = DetectionCollator(processor(size=SIZES["fixed"]), Augmentation(scale=(2.0, 2.0)))
    (label,) = collate([item(60, 80)])["labels"]
    assert label["orig_size"].tolist() == [60, 80]


def test_switches_of_the_processor_are_honoured():
    plain = processor(do_resize=False, do_normalize=False, do_rescale=False)
    source = item(20, 30)
    batch = DetectionCollator(plain)([source])
    assert np.array_equal(batch["pixel_values"][0].numpy(), source["image"].numpy())


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match="batch is empty"):
        DetectionCollator(processor())([])


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1)], ids=["wide", "tall"])
def test_images_of_extreme_shape_keep_a_pixel(size, shape):
    batch = DetectionCollator(processor(size=size))([item(*shape)])
    assert min(batch["pixel_values"].shape[2:]) >= 1
    assert batch["pixel_values"].isfinite().all()
    assert batch["labels"][0]["boxes"].tolist() == [[0.5, 0.75, 0.5, 0.5]]
