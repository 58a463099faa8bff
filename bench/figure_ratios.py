"""Every candidate's time relative to attention without divergence, per shape."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figure_style import COLOURS, INK, LABELS, bare
from bench.measurements import Run, Timing, candidates_of
from bench.peers import PASSES
from bench.rounds import YARDSTICK

BAR = 0.8  # of the space between two bars


def draw_ratios(run: Run, *, dtype: str = "float32") -> Figure | None:
    """Bars of time / time of `sdpa`, one panel a pass; None without timings of that dtype."""
    timings = run.of("time", dtype)
    if not timings:
        return None
    drawn = [name for name in COLOURS if name in candidates_of(timings) and name != YARDSTICK]
    shapes = list(dict.fromkeys(timing.shape for timing in timings))
    height = 1.2 + 0.2 * (len(drawn) + 1) * len(shapes)
    figure, panels = plt.subplots(
        1, len(PASSES), figsize=(9.5, height), sharey=True, layout="constrained"
    )
    for axes, pass_name in zip(panels, PASSES, strict=True):
        by_shape = {t.shape: t for t in timings if t.pass_name == pass_name}
        _draw_panel(axes, by_shape, shapes, drawn)
        axes.set_title(pass_name, loc="left", fontsize=11)
    panels[0].set_yticks(range(len(shapes)), [_shape_label(timings, name) for name in shapes])
    panels[0].invert_yaxis()
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(drawn), frameon=False)
    figure.suptitle(
        "Attention with its divergence, time relative to torch's attention without it "
        f"({dtype}; shorter is better)",
        fontsize=11,
    )
    return figure


def _draw_panel(
    axes: Axes, by_shape: dict[str, Timing], shapes: list[str], drawn: list[str]
) -> None:
    step = 1 / (len(drawn) + 1)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    for name in drawn:
        places, ratios = [], []
        for row, shape in enumerate(shapes):
            present = [n for n in drawn if shape in by_shape and n in by_shape[shape].seconds]
            if name in present:  # the bars of a shape stay together where a candidate is missing
                places.append(row + (present.index(name) - (len(present) - 1) / 2) * step)
                ratios.append(by_shape[shape].median(name) / by_shape[shape].median(YARDSTICK))
        bars = axes.barh(places, ratios, height=BAR * step, color=COLOURS[name], label=LABELS[name])
        for bar, ratio in zip(bars, ratios, strict=True):
            # beside the bar, or beside the dashed line where it would cross the figures
            axes.annotate(
                f"{ratio:.2f}",
                (max(ratio, 1.0), bar.get_y() + bar.get_height() / 2),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("time / time of scaled_dot_product_attention")
    bare(axes, "top", "right", "left")
    axes.tick_params(axis="y", length=0)


def _shape_label(timings: list[Timing], shape: str) -> str:
    sizes = next(timing.sizes for timing in timings if timing.shape == shape)
    return f"{shape}\n{sizes['Lq']} × {sizes['Lk']}"
