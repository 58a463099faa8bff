"""The report's files: complete, self-contained, and saying what was measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import PIL.Image
import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from attn_kd.models import save_detector
from attn_kd.report.memory import AttentionMemory
from attn_kd.report.page import write_report
from attn_kd.report.results import Results, Run
from attn_kd.report.scenes import Sample

MEMORY = AttentionMemory(4200, 8, 32, "cpu", fused_bytes=20_000_000, eager_bytes=3_000_000_000)


@pytest.fixture(scope="module")
def results(detectors, tmp_path_factory):
    def run(role: str, name: str, precision: float, divergence: float | None) -> Run:
        folder = tmp_path_factory.mktemp("models") / role
        detector = detectors["teacher" if role == "teacher" else "student"]
        save_detector(detector.model, detector.processor, folder)
        metrics = {"mAP50": precision, "images_per_second": 50.0, "parameters": 1234567}
        history = [
            {"step": step, "detection_loss": 9 / step, "attention_kl": 1 / step}
            for step in range(1, 5)
        ]
        return Run(role, name, folder, metrics, history, divergence, seconds=12.0)

    runs = [
        run("teacher", "Teacher 2/2", 0.71, None),
        run("baseline", "Baseline <1/1>", 0.52, 0.8),
        run("student", "Distilled 1/1", 0.53, 0.2),
    ]
    return Results(runs, "24 clips", MEMORY, {"seed": 7})


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    samples = [
        Sample(PIL.Image.effect_noise((64, 48), 50), [[10, 10, 40, 30]], "with object"),
        Sample(PIL.Image.effect_noise((64, 48), 50), [], "without object"),
    ]
    write_report(results, samples, out)
    return out


class _Elements(HTMLParser):
    """All elements of a page with their attributes, and whether they nest."""

    void = frozenset({"meta", "link", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed(report):
    assert _Elements(page(report)).open == []


def test_page_asks_for_nothing_outside_itself(report):
    for tag, attributes in _Elements(page(report)).found:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert re.findall(r"url\((?!#)|@import", page(report)) == []


def test_every_figure_has_a_name(report):
    figures = [found for found in _Elements(page(report)).found if found[0] == "svg"]
    # Two charts; a query and three maps for the one frame with an object; three times two frames.
    assert len(figures) == 2 + 4 + 6
    assert all(attributes["role"] == "img" for _, attributes in figures)
    assert all(attributes["aria-label"] for _, attributes in figures)


def test_names_are_escaped(report):
    assert "Baseline &lt;1/1&gt;" in page(report)
    assert "Baseline <1/1>" not in page(report)


def test_table_and_page_show_what_was_measured(report):
    text = (report / "results.txt").read_text()
    for cell in ("Distilled 1/1", "1,234,567", "0.530", "0.2000", "3.00 GB", "4,200 tokens"):
        assert cell in text
        assert cell in page(report)


def test_columns_of_the_text_are_aligned(report):
    header, rule, *rows = (report / "results.txt").read_text().splitlines()[:5]
    assert {len(line) for line in (rule, *rows)} == {len(header)}


def test_json_holds_the_results(report):
    document = json.loads((report / "report.json").read_text())
    assert [run["role"] for run in document["runs"]] == ["teacher", "baseline", "student"]
    assert document["runs"][2]["metrics"]["mAP50"] == 0.53
    assert document["attention_memory"]["tokens"] == 4200
    assert document["machine"]["torch"]
