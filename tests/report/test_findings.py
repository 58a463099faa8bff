"""The sentences say what the figures say, also when distillation did not help."""

from __future__ import annotations

from pathlib import Path

import pytest

from attn_kd.report.findings import findings
from attn_kd.report.results import Results, Run


def results(*, student_precision: float = 0.5, student_kl: float | None = 0.1) -> Results:
    def run(role: str, precision: float, divergence: float | None) -> Run:
        metrics = {"mAP50": precision, "images_per_second": 10.0, "parameters": 100}
        return Run(role, role, Path(role), metrics, [], divergence)

    runs = [
        run("teacher", 0.7, None),
        run("baseline", 0.4, 0.2),
        run("student", student_precision, student_kl),
    ]
    return Results(runs, "10 frames")


@pytest.mark.parametrize(
    ("precision", "figure", "verdict"),
    [(0.5, "+0.100", "above"), (0.3, "-0.100", "below"), (0.4, "+0.000", "the same as")],
)
def test_precision_is_told_as_it_came_out(precision, figure, verdict):
    finding = findings(results(student_precision=precision))[1]
    assert finding.figure == figure
    assert verdict in finding.text


def test_share_of_the_attention_divergence():
    assert findings(results(student_kl=0.05))[0].figure == "25%"


def test_what_was_not_measured_is_left_out():
    assert len(findings(results(student_kl=None))) == 2
