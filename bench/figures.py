"""The figures of a run, as files."""

from __future__ import annotations

from pathlib import Path

from bench.figure_ratios import draw_ratios
from bench.figure_scaling import draw_scaling
from bench.figure_style import save
from bench.figure_training import draw_training
from bench.measurements import Run

FIGURES = {
    "benchmark.png": draw_ratios,
    "benchmark_scaling.png": draw_scaling,
    "benchmark_training.png": draw_training,
}


def draw_all(run: Run, folder: Path) -> list[Path]:
    """Draw into a folder what the run has measurements for; return what was written."""
    written = []
    for name, draw in FIGURES.items():
        figure = draw(run)
        if figure is not None:
            save(figure, folder / name)
            written.append(folder / name)
    return written
