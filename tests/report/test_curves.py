"""Line charts: what is drawn, and that they fit into a page."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")

from attn_kd.report.curves import Curve, draw_curves, running_median

HISTORY = [
    {"step": 1, "attention_kl": 0.5, "loss": 2.0},
    {"step": 2, "attention_kl": float("nan"), "loss": 1.0},
    {"step": 3, "eval_mAP50": 0.1},
    {"step": 4, "attention_kl": 0.25, "loss": 0.5},
]


def test_curve_takes_the_finite_values_of_its_key():
    curve = Curve.from_history("student", "Distilled", HISTORY, "attention_kl")
    assert (curve.steps, curve.values) == ([1, 4], [0.5, 0.25])


def test_running_median_ignores_an_outlier():
    assert running_median([1, 1, 100, 1, 1], window=1).tolist() == [1, 1, 1, 1, 1]


def test_running_median_keeps_a_slope():
    assert running_median([1, 2, 3, 4, 5], window=2).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("values", [[0.4, 0.41], [0.01, 1.0], [0.0, 1.0], []], ids=str)
def test_figure_is_one_named_element_in_the_pages_colours(values):
    curve = Curve("student", "Distilled 1/1", list(range(len(values))), values)
    svg = draw_curves([curve], title="KL & more", value_label="nats", logarithmic=True)
    element = ElementTree.fromstring(svg)
    assert element.tag.endswith("svg")
    assert element.attrib["aria-label"] == "KL & more"
    assert "Distilled 1/1" in "".join(element.itertext())
    assert "var(--student)" in svg
    assert "#060606" not in svg


def test_equal_figures_are_equal_text():
    curve = Curve("student", "Distilled", [1, 2], [3.0, 4.0])
    first, second = (draw_curves([curve], title="t", value_label="v") for _ in range(2))
    assert first == second
