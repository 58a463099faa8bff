"""Line charts of a training's history, as SVG that follows the colours of the page around it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# matplotlib draws in these stand-ins, which become the page's variables in the finished SVG.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--teacher)",
    "#050505": "var(--baseline)",
    "#060606": "var(--student)",
}
_COLOURS = {variable[6:-1]: colour for colour, variable in _VARIABLES.items()}
_DASHES = {"teacher": (0, (1.2, 1.4)), "baseline": (0, (5, 1.8)), "student": "solid"}

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.edgecolor": _COLOURS["rule"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLOURS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": _COLOURS["rule"],
    "ytick.color": _COLOURS["rule"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.labelcolor": _COLOURS["muted"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: selectable, and in the reader's font
}


@dataclass(frozen=True)
class Curve:
    """One line: whose it is, and its values by training step."""

    role: str  # of attn_kd.report.results.ROLES; gives colour and dash
    name: str
    steps: Sequence[float]
    values: Sequence[float]

    @classmethod
    def from_history(
        cls, role: str, name: str, history: Sequence[Mapping[str, Any]], key: str
    ) -> Curve:
        """The entries of a training's history that have a finite value under ``key``."""
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        points = [(step, value) for step, value in points if np.isfinite(value)]
        return cls(role, name, [step for step, _ in points], [value for _, value in points])


def draw_curves(
    curves: Sequence[Curve], *, title: str, value_label: str, logarithmic: bool = False
) -> str:
    """An ``<svg>`` element: each curve faintly as logged and strongly as its running median.

    Args:
        title: for screen readers; shown as a tooltip too.
        value_label: what the vertical axis shows, with its unit.
        logarithmic: whether the vertical axis is, if the values span enough for it to show more.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(6.0, 3.5), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _draw_curve(axes, curve)
        if logarithmic and _span(curves) > 5:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("training step")
        axes.set_title(value_label, loc="left", fontsize=10.5, color=_COLOURS["muted"], pad=26)
        axes.margins(x=0.01)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=3,
            borderaxespad=0,
            handlelength=2.4,
        )
        buffer = io.StringIO()
        # No metadata: the date would make equal figures differ.
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), title)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    colour, dash = _COLOURS[curve.role], _DASHES[curve.role]
    axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.25)
    smooth = running_median(curve.values, window=max(1, len(curve.values) // 15))
    axes.plot(curve.steps, smooth, color=colour, linewidth=2.0, linestyle=dash, label=curve.name)


def _span(curves: Sequence[Curve]) -> float:
    """The ratio of the largest to the smallest positive value."""
    positive = [value for curve in curves for value in curve.values if value > 0]
    return max(positive) / min(positive) if positive else 1.0


def running_median(values: Sequence[float], window: int) -> np.ndarray:
    """The median of each value and ``window`` neighbours to either side.

    Towards the ends there are fewer, to both sides alike, so that a slope is not flattened.
    """
    array = np.asarray(values, dtype=float)
    reach = [min(window, i, len(array) - 1 - i) for i in range(len(array))]
    return np.array([np.median(array[i - r : i + r + 1]) for i, r in enumerate(reach)])


def _inline(svg: str, title: str) -> str:
    """Make an element of the page of matplotlib's SVG file: named, recoloured, no preamble."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font(-family)?: ([\d.]+px )?[^;\"]*(sans-serif|DejaVu)[^;\"]*", _page_font, svg)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    name = html.escape(title)
    return re.sub(
        r"<svg([^>]*)>",
        f'<svg role="img" aria-label="{name}"\\1><title>{name}</title>',
        svg,
        count=1,
    )


def _page_font(match: re.Match[str]) -> str:
    size = match[2]
    return f"font-size: {size.strip()}; font-family: inherit" if size else "font-family: inherit"
