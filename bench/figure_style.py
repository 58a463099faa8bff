"""What the figures share: a candidate looks the same in all of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attn_kd._atomic import replacing_file
from bench.rounds import SUBJECT, YARDSTICK

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    YARDSTICK: "#333333",
    SUBJECT: "#0072B2",
    "sdpa_identity": "#E69F00",
    "compiled": "#999999",
    "eager": "#D55E00",
}
LABELS = {
    YARDSTICK: "sdpa, no divergence",
    SUBJECT: "attn_kd, fused",
    "sdpa_identity": "three attentions in one (stock operators)",
    "compiled": "torch.compile of stored maps",
    "eager": "stored maps",
}
MARKERS = {YARDSTICK: "s", SUBJECT: "o", "sdpa_identity": "^", "compiled": "v", "eager": "D"}
INK = "#333333"


def bare(axes: Axes, *spines: str) -> None:
    """Take away the frame's sides that carry no scale."""
    axes.spines[list(spines)].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all; the suffix of path sets the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=160, facecolor="white")
    plt.close(figure)
