"""Augmentation: boxes follow the picture, and randomness follows the seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_kd.data import Augmentation
from attn_kd.errors import InputError

NOTHING = {"flip": 0.0, "scale_probability": 0.0, "gamma": (1.0, 1.0), "gain": (1.0, 1.0)}


def scene(box: tuple[int, int, int, int], height: int = 60, width: int = 80):
    """A black picture with one white box."""
    x0, y0, x1, y1 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y0:y1, x0:x1] = 255
    return image, torch.tensor([box], dtype=torch.float32), torch.tensor([3])


def extent(image: torch.Tensor) -> list[int]:
    """The box around what is not black, xyxy."""
    rows, columns = image.amax(0).nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@given(
    seed=st.integers(0, 10_000),
    x=st.integers(0, 50),
    y=st.integers(0, 40),
    width=st.integers(2, 30),
    height=st.integers(2, 20),
)
def test_the_box_surrounds_what_it_surrounded(seed, x, y, width, height):
    augment = Augmentation(gamma=(1.0, 1.0), gain=(1.0, 1.0), keep=0.0)
    generator = torch.Generator().manual_seed(seed)
    image, boxes, labels = augment(*scene((x, y, x + width, y + height)), generator)
    if len(labels):
        assert boxes.tolist() == [extent(image)]
        assert labels.tolist() == [3]
    else:
        assert not image.any()


@given(seed=st.integers(0, 10_000))
def test_boxes_stay_inside_and_are_never_degenerate(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(6, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 1 + 9 * torch.rand(6, 2, generator=generator)], dim=1)
    image = torch.zeros(3, 60, 60, dtype=torch.uint8)
    image, boxes, labels = Augmentation(scale=(0.5, 4.0))(image, boxes, torch.arange(6), generator)
    assert len(boxes) == len(labels)
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= image.shape[2]).all()
    assert (boxes[:, 3] <= image.shape[1]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()


def test_equal_seeds_give_equal_results_and_others_do_not():
    def run(seed: int) -> torch.Tensor:
        image = (torch.arange(3 * 60 * 80) % 251).to(torch.uint8).view(3, 60, 80)
        _, boxes, labels = scene((10, 10, 40, 40))
        return Augmentation()(image, boxes, labels, torch.Generator().manual_seed(seed))[0]

    assert torch.equal(run(5), run(5))
    assert len({tuple(run(seed).shape) for seed in range(6)}) > 1


def test_without_a_generator_torch_s_own_is_used():
    image, boxes, labels = scene((10, 10, 40, 40))
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(Augmentation()(image, boxes, labels)[0])
    assert torch.equal(*results)


def test_a_flip_mirrors_the_box():
    image, boxes, labels = scene((10, 5, 30, 25))
    image, boxes, _ = Augmentation(**{**NOTHING, "flip": 1.0})(image, boxes, labels)
    assert boxes.tolist() == [[50, 5, 70, 25]]
    assert extent(image) == [50, 5, 70, 25]


def test_objects_that_are_mostly_cut_off_go():
    # Enlarged eight times, a window of 10 x 7.5 pixels cannot hold 40 % of a 40 x 40 box.
    augment = Augmentation(**{**NOTHING, "scale_probability": 1.0, "scale": (8.0, 8.0)})
    _, boxes, labels = augment(*scene((20, 10, 60, 50)))
    assert len(boxes) == len(labels) == 0


def test_gain_and_gamma_follow_their_formula():
    image = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    augment = Augmentation(**{**NOTHING, "gamma": (2.0, 2.0), "gain": (1.5, 1.5)})
    result, _, _ = augment(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    expected = 255 * 1.5 * (128 / 255) ** 2
    assert (result.float() - expected).abs().max() <= 0.5


def test_the_input_is_left_alone():
    image, boxes, labels = scene((10, 10, 40, 40))
    before = image.clone(), boxes.clone()
    for _ in range(4):
        Augmentation()(image, boxes, labels)
    assert torch.equal(image, before[0])
    assert torch.equal(boxes, before[1])


@pytest.mark.parametrize(
    "setting",
    [{"flip": 1.5}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"stretch": 0.5}, {"keep": -0.1}],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_make_no_sense_are_named(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        Augmentation(**setting)
