"""Figures are drawn of what was measured, and not of what was not."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from bench.figure_scaling import draw_scaling
from bench.figures import FIGURES, draw_all
from bench.measurements import Memory
from bench.model_tables import WAYS
from bench.workloads import GRID, SHAPES
from tests.bench.runs import run_of, timing

SHAPE_NAMES = ("hw169", "hw400", "dc5")


def measured_run():
    shapes = {name: (GRID | SHAPES)[name] for name in SHAPE_NAMES}
    seconds = {"sdpa": [1.0], "attn_kd": [0.9], "sdpa_identity": [2.5], "eager": [6.0]}
    layers = [
        timing(
            seconds,
            shape=name,
            sizes=shape._asdict(),
            pass_name=pass_name,
            kind="time" if name in SHAPES else "grid",
        )
        for name, shape in shapes.items()
        for pass_name in ("forward", "forward+backward")
    ]
    memory = [
        Memory("memory", name, shape._asdict(), {"sdpa": [10], "eager": [99]}, shape.map_bytes)
        for name, shape in shapes.items()
    ]
    sizes = {"preset": "detr-tiny", "pixels": 128, "batch": 1}
    steps = timing({way: [1.0] for way in WAYS}, kind="training", shape="tiny", sizes=sizes)
    peak = Memory("training memory", "tiny", sizes, {way: [10] for way in WAYS})
    return run_of(*layers, steps, memory=(*memory, peak))


def test_all_are_drawn_as_png_with_nothing_left_behind(tmp_path):
    written = draw_all(measured_run(), tmp_path / "images")
    assert [path.name for path in written] == list(FIGURES)
    assert sorted((tmp_path / "images").iterdir()) == sorted(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_none_is_drawn_of_nothing(tmp_path):
    assert draw_all(run_of(), tmp_path) == []


def test_scaling_joins_the_grid_with_the_shapes_that_are_like_it():
    time, memory = draw_scaling(measured_run()).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in time.lines}
    assert lines["attn_kd, fused"] == [[169, 0.9], [400, 0.9], [4200, 0.9]]
    assert len(memory.lines) == 2
    assert {time.get_xscale(), time.get_yscale()} == {"log"}
