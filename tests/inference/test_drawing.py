"""Pictures with boxes: where the lines are, and that small pictures become legible."""

from __future__ import annotations

import PIL.Image
import pytest

pytest.importorskip("transformers")

import torch

from attn_kd.inference import Detections
from attn_kd.inference.drawing import draw_detections

BLACK = (0, 0, 0)


def one_box(*box: float) -> Detections:
    return Detections(torch.tensor([box]), torch.tensor([0.9]), torch.tensor([0]))


def nothing() -> Detections:
    return Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))


def test_box_is_drawn_on_its_edges_only():
    image = PIL.Image.new("L", (600, 600))
    picture = draw_detections(image, one_box(100, 200, 300, 500), {0: "needle"})
    for on_edge in [(100, 300), (300, 300), (200, 500)]:
        assert picture.getpixel(on_edge) != BLACK
    for off_edge in [(200, 350), (50, 300), (200, 550)]:
        assert picture.getpixel(off_edge) == BLACK


def test_small_picture_is_enlarged_by_a_whole_factor():
    picture = draw_detections(PIL.Image.new("L", (128, 96)), nothing(), {})
    assert picture.size == (512, 384)


def test_picture_without_detections_is_unchanged():
    image = PIL.Image.effect_noise((600, 600), 50)
    assert draw_detections(image, nothing(), {}).tobytes() == image.convert("RGB").tobytes()


def test_caption_of_a_box_at_the_top_is_inside_the_picture():
    image = PIL.Image.new("L", (600, 600))
    picture = draw_detections(image, one_box(0, 0, 600, 600), {0: "needle"})
    assert picture.getpixel((10, 10)) != BLACK
