"""Time and peak memory of whole training steps, per detector and image size."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figure_style import COLOURS, INK, bare
from bench.measurements import Run
from bench.model_tables import WAYS

WAY_COLOURS = {
    "none": "#BBBBBB",
    "teacher": "#777777",
    "attn_kd": COLOURS["attn_kd"],
    "eager": COLOURS["eager"],
}
WAY_LABELS = {
    "none": "no distillation",
    "teacher": "teacher runs, its attention unused",
    "attn_kd": "distilled, fused",
    "eager": "distilled, stored maps",
}
Series = dict[str, dict[str, float]]  # setting -> way -> figure


def draw_training(run: Run) -> Figure | None:
    """Bars, one panel for time and one for memory; None where training was not measured."""
    seconds = {t.shape: {way: t.median(way) for way in WAYS} for t in run.of("training")}
    mebibytes = {
        memory.shape: {way: memory.median(way) / 2**20 for way in WAYS}
        for memory in run.memory_of("training memory")
    }
    if not seconds or not mebibytes:
        return None
    settings = [setting for setting in seconds if setting in mebibytes]  # the larger ones
    height = 1.2 + 0.2 * (len(WAYS) + 1) * len(settings)
    figure, panels = plt.subplots(1, 2, figsize=(9.5, height), sharey=True, layout="constrained")
    _draw_panel(panels[0], settings, seconds, _seconds)
    panels[0].set_xlabel("time of a step, s")
    _draw_panel(panels[1], settings, mebibytes, lambda value: f"{value:.0f}")
    panels[1].set_xlabel("peak memory of a step beyond weights and optimizer, MiB")
    sizes = {timing.shape: timing.sizes for timing in run.of("training")}
    names = ["{preset}\n{pixels} × {pixels}".format(**sizes[name]) for name in settings]
    panels[0].set_yticks(range(len(settings)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(WAYS), frameon=False)
    figure.suptitle(
        "Training a DETR-1/1, frozen backbone (float32; shorter is better)", fontsize=11
    )
    return figure


def _draw_panel(
    axes: Axes, settings: list[str], series: Series, write: Callable[[float], str]
) -> None:
    step = 1 / (len(WAYS) + 1)
    for index, way in enumerate(WAYS):
        places = [row + (index - (len(WAYS) - 1) / 2) * step for row in range(len(settings))]
        values = [series[setting][way] for setting in settings]
        bars = axes.barh(
            places, values, height=0.8 * step, color=WAY_COLOURS[way], label=WAY_LABELS[way]
        )
        axes.bar_label(bars, [write(v) for v in values], padding=3, fontsize=8, color=INK)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    bare(axes, "top", "right", "left")
    axes.tick_params(axis="y", length=0)


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
