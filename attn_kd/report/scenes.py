"""Pictures of frames with boxes or an attention map over them, as SVG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import PIL.Image
from torch import Tensor

from attn_kd.inference import Detections

Box = Sequence[float]  # x1, y1, x2, y2 in pixels

# On ultrasound these must be bright whatever the colour scheme of the page.
_BOX_COLOURS = {"teacher": "#dfe6ee", "baseline": "#ff9f4a", "student": "#5fb4ff"}
_TRUTH_COLOUR = "#7df0a8"


@dataclass(frozen=True)
class Sample:
    """A frame of the evaluated split and the boxes that are labelled in it."""

    image: PIL.Image.Image
    boxes: Sequence[Box]
    caption: str  # e.g. "short insertion"


def draw_scene(sample: Sample, role: str, detections: Detections, *, label: str) -> str:
    """The frame with its true boxes dashed and the detections of one detector, best on top."""
    unit = max(sample.image.size) / 128
    shapes = [_image(sample.image), *(_true_box(box, unit) for box in sample.boxes)]
    for box, score, _ in reversed(detections.rows()):
        shapes.append(_rectangle(box, _BOX_COLOURS[role], 1.3 * unit))
        shapes.append(_score(box, score, sample.image.size, _BOX_COLOURS[role], unit))
    return _svg(sample.image.size, shapes, label)


def draw_attention(
    sample: Sample, weights: Tensor, query: tuple[float, float], *, label: str
) -> str:
    """The frame, darkened, with attention ``weights`` [h, w] over it and the query marked.

    Args:
        query: the middle of the token that attends, in pixels.
    """
    shapes = [
        _image(sample.image),
        _image(_heat(weights), sample.image.size, pixelated=True),
        _query_mark(query, max(sample.image.size) / 128),
    ]
    return _svg(sample.image.size, shapes, label)


def draw_query(sample: Sample, query: tuple[float, float], *, label: str) -> str:
    """The frame with its true boxes and the position whose attention is shown beside it."""
    unit = max(sample.image.size) / 128
    shapes = [_image(sample.image), *(_true_box(box, unit) for box in sample.boxes)]
    return _svg(sample.image.size, [*shapes, _query_mark(query, unit)], label)


def _svg(size: tuple[int, int], shapes: Sequence[str], label: str) -> str:
    name = html.escape(label)
    return (
        f'<svg role="img" aria-label="{name}" viewBox="0 0 {size[0]} {size[1]}">'
        f"<title>{name}</title>{''.join(shapes)}</svg>"
    )


def _image(
    image: PIL.Image.Image, size: tuple[int, int] | None = None, *, pixelated: bool = False
) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    width, height = size or image.size
    data = base64.b64encode(buffer.getvalue()).decode()
    rendering = ' style="image-rendering:pixelated"' if pixelated else ""
    return (
        f'<image width="{width}" height="{height}" preserveAspectRatio="none"{rendering} '
        f'href="data:image/png;base64,{data}"/>'
    )


def _heat(weights: Tensor) -> PIL.Image.Image:
    """Weights as shares of the largest, in colours; weak ones let the frame shine through."""
    share = (weights / weights.max()).numpy()
    rgba = matplotlib.colormaps["inferno"](share)
    rgba[..., 3] = 0.55 + 0.4 * share
    return PIL.Image.fromarray(np.round(255 * rgba).astype(np.uint8), mode="RGBA")


def _rectangle(box: Box, colour: str, width: float, dashes: str = "") -> str:
    x1, y1, x2, y2 = box
    return (
        f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none" '
        f'stroke="{colour}" stroke-width="{width:.2f}" stroke-dasharray="{dashes or "none"}"/>'
    )


def _true_box(box: Box, unit: float) -> str:
    return _rectangle(box, _TRUTH_COLOUR, unit, f"{3 * unit:.1f} {2 * unit:.1f}")


def _score(box: Box, score: float, size: tuple[int, int], colour: str, unit: float) -> str:
    """The score above the box's left corner, or below the box where there is no room above."""
    text = 7.5 * unit
    x = min(max(box[0], unit), size[0] - 2.3 * text)
    y = box[1] - 1.6 * unit if box[1] > text + unit else min(box[3] + text, size[1] - unit)
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{text:.1f}" font-weight="600" fill="{colour}" '
        f'stroke="#000" stroke-width="{1.4 * unit:.1f}" paint-order="stroke">{score:.2f}</text>'
    )


def _query_mark(query: tuple[float, float], unit: float) -> str:
    x, y = query
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3.2 * unit:.1f}" fill="none" '
    return (
        f'{circle}stroke="#000" stroke-width="{2.6 * unit:.1f}"/>'
        f'{circle}stroke="#fff" stroke-width="{1.2 * unit:.1f}"/>'
    )
