"""Time and peak memory of one layer, forward and backward, against the number of tokens HW."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.figure_style import COLOURS, INK, LABELS, MARKERS, bare
from bench.measurements import Run
from bench.workloads import GRID, Shape

DRAWN = ("eager", "sdpa_identity", "attn_kd", "sdpa")
Series = dict[str, dict[int, float]]  # candidate -> HW -> figure


def draw_scaling(run: Run) -> Figure | None:
    """Two panels with logarithmic axes; None where there are not two sizes to draw a line between.

    One image, 8 heads of 32, float32: the shapes of the grid, and dc5 and video.
    """
    seconds: Series = {name: {} for name in DRAWN}
    for timing in run.of("grid") + run.of("time", "float32"):
        if timing.pass_name == "forward+backward" and _is_of_grid(timing.sizes):
            for name in seconds.keys() & timing.seconds.keys():
                seconds[name][timing.sizes["Lk"]] = timing.median(name)
    mebibytes: Series = {name: {} for name in DRAWN}
    for memory in run.memory_of("memory"):
        if _is_of_grid(memory.sizes):
            for name in mebibytes.keys() & memory.peak_bytes.keys():
                mebibytes[name][memory.sizes["Lk"]] = memory.median(name) / 2**20
    if min(_sizes(seconds), _sizes(mebibytes)) < 2:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.6), layout="constrained")
    _draw_panel(panels[0], seconds, "time", _time_label)
    _draw_panel(panels[1], mebibytes, "peak memory beyond the inputs", _memory_label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(DRAWN), frameon=False)
    figure.suptitle(
        "One attention layer with its divergence, forward and backward (float32, 8 heads of 32, "
        "one image)",
        fontsize=11,
    )
    return figure


def _is_of_grid(sizes: Mapping[str, int]) -> bool:
    like = next(iter(GRID.values()))
    expected = like._replace(Lq=sizes["Lk"], Lk=sizes["Lk"])
    return Shape(**sizes) == expected


def _sizes(series: Series) -> int:
    return len({HW for by_size in series.values() for HW in by_size})


def _draw_panel(axes: Axes, series: Series, title: str, label: Callable[[float, int], str]) -> None:
    sizes = sorted({HW for by_size in series.values() for HW in by_size})
    for name, by_size in series.items():
        if by_size:
            axes.plot(
                sorted(by_size),
                [by_size[HW] for HW in sorted(by_size)],
                color=COLOURS[name],
                marker=MARKERS[name],
                markersize=5,
                linewidth=1.6,
                linestyle="--" if name == "sdpa" else "-",
                label=LABELS[name],
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{HW:,}".replace(",", "\u202f") for HW in sizes], rotation=40)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(label))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("tokens HW", color=INK)
    axes.set_title(title, loc="left", fontsize=11)
    bare(axes, "top", "right")


def _time_label(seconds: float, _position: int) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{1e3 * seconds:g} ms"


def _memory_label(mebibytes: float, _position: int) -> str:
    return f"{mebibytes:,.10g} MiB".replace(",", "\u202f")
