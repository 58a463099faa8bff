"""Pictures with the detected boxes drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from attn_kd.data import to_rgb
from attn_kd.inference.detector import Detections

# Okabe and Ito's colours, told apart by colour-blind readers and visible on grey ultrasound.
_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
_LONGEST_SIDE = 512  # smaller pictures are enlarged to about this, or no caption would be legible


def draw_detections(
    image: PIL.Image.Image, detections: Detections, label_names: Mapping[int, str]
) -> PIL.Image.Image:
    """A copy of ``image`` in RGB with a box and a caption (name and score) per detection.

    Small pictures are enlarged by a whole factor.
    """
    factor = max(1, _LONGEST_SIDE // max(image.size))
    size = (image.width * factor, image.height * factor)
    picture = to_rgb(image).resize(size, PIL.Image.Resampling.NEAREST)
    canvas = PIL.ImageDraw.Draw(picture)
    unit = max(picture.size) / _LONGEST_SIDE
    font = PIL.ImageFont.load_default(size=15 * unit)
    # The best detection is drawn last, on top of the others.
    for box, score, label in reversed(detections.rows()):
        colour = _COLOURS[label % len(_COLOURS)]
        corners = [corner * factor for corner in box]
        canvas.rectangle(corners, outline=colour, width=round(2.5 * unit) or 1)
        caption = f"{label_names.get(label, label)} {score:.2f}"
        _write_caption(canvas, caption, corners, font=font, colour=colour, margin=3 * unit)
    return picture


def _write_caption(
    canvas: PIL.ImageDraw.ImageDraw,
    caption: str,
    corners: Sequence[float],
    *,
    font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont,
    colour: str,
    margin: float,
) -> None:
    """Put ``caption`` above the box, or inside its top edge where there is no room above."""
    left, top, right, bottom = canvas.textbbox((0, 0), caption, font=font)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(corners[0], canvas.im.size[0] - width))
    y = corners[1] - height if corners[1] >= height else corners[1]
    canvas.rectangle([x, y, x + width, y + height], fill=colour)
    canvas.text((x + margin - left, y + margin - top), caption, font=font, fill="black")
