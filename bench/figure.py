"""The figure of the README: every candidate's time relative to attention without divergence."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from attn_kd._atomic import replacing_file
from bench.measurements import SUBJECT, Run, Timing, candidates_of
from bench.peers import PASSES

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    SUBJECT: "#0072B2",
    "sdpa_identity": "#E69F00",
    "compiled": "#999999",
    "eager": "#D55E00",
}
LABELS = {
    SUBJECT: "attn_kd, fused",
    "sdpa_identity": "three attentions in one (stock operators)",
    "compiled": "torch.compile of stored maps",
    "eager": "stored maps",
}
BAR = 0.8  # of the space between two bars


def draw_ratios(run: Run, path: Path, *, dtype: str = "float32") -> None:
    """Write bars of time / time of `sdpa`, one panel a pass; the suffix of path sets the format.

    Raises:
        ValueError: the run has no measurement of that dtype.
    """
    timings = run.of_dtype(dtype)
    if not timings:
        raise ValueError(f"the run has no timings of dtype {dtype}")
    drawn = [name for name in COLOURS if name in candidates_of(timings)]
    shapes = list(dict.fromkeys(timing.shape for timing in timings))
    height = 0.9 + 0.2 * (len(drawn) + 1) * len(shapes)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=160, facecolor="white")
    plt.close(figure)


def _draw_panel(
    axes: Axes, by_shape: dict[str, Timing], shapes: list[str], drawn: list[str]
) -> None:
    step = 1 / (len(drawn) + 1)
    for name in drawn:
        places, ratios = [], []
        for row, shape in enumerate(shapes):
            present = [n for n in drawn if shape in by_shape and n in by_shape[shape].seconds]
            if name in present:  # the bars of a shape stay together where a candidate is missing
                places.append(row + (present.index(name) - (len(present) - 1) / 2) * step)
                ratios.append(by_shape[shape].ratio("sdpa", name))
        bars = axes.barh(places, ratios, height=BAR * step, color=COLOURS[name], label=LABELS[name])
        for text in axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color="#333333"):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.axvline(1, color="#333333", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("time / time of scaled_dot_product_attention")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _shape_label(timings: list[Timing], shape: str) -> str:
    sizes = next(timing.sizes for timing in timings if timing.shape == shape)
    return f"{shape}\n{sizes['Lq']} × {sizes['Lk']}"
