"""Pictures of frames: what is drawn where."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch

from attn_kd.inference import Detections
from attn_kd.report.scenes import Sample, draw_attention, draw_scene

SAMPLE = Sample(PIL.Image.new("L", (128, 64), 99), [[10, 20, 30, 50]], "with object")


def elements(svg: str, tag: str) -> list[dict]:
    return [found.attrib for found in ElementTree.fromstring(svg).iter(tag)]


def picture(image: dict) -> np.ndarray:
    data = base64.b64decode(image["href"].partition(",")[2])
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


def test_scene_shows_label_and_detections():
    found = Detections(
        torch.tensor([[40.0, 5, 60, 25], [70, 5, 90, 25]]), torch.tensor([0.9, 0.6]), torch.zeros(2)
    )
    svg = draw_scene(SAMPLE, "student", found, label="a & b")
    truth, worse, best = elements(svg, "rect")
    assert [float(truth[key]) for key in ("x", "y", "width", "height")] == [10, 20, 20, 30]
    assert truth["stroke-dasharray"] != "none"
    assert (float(worse["x"]), float(best["x"])) == (70, 40)
    assert [text.text for text in ElementTree.fromstring(svg).iter("text")] == ["0.60", "0.90"]
    (frame,) = elements(svg, "image")
    assert (picture(frame) == 99).all()


def test_attention_is_brightest_where_the_weight_is():
    weights = torch.tensor([[0.0, 0.1], [0.2, 0.7]])
    svg = draw_attention(SAMPLE, weights, (96, 48), label="map")
    _, overlay = elements(svg, "image")
    assert (overlay["width"], overlay["height"]) == ("128", "64")
    brightness = picture(overlay).astype(float).sum(axis=-1)
    assert brightness.shape == (2, 2)
    assert brightness.argmax() == 3 and brightness.argmin() == 0
    assert {(ring["cx"], ring["cy"]) for ring in elements(svg, "circle")} == {("96.0", "48.0")}
