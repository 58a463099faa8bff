"""A picture that shows what the simulator makes: a row per clip, time from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from attn_kd.data.needle.settings import NeedleSettings
from attn_kd.data.needle.simulation import NeedleClips, simulate_clips, simulate_frames
from attn_kd.errors import InputError

_GREYS = 64  # speckle compresses badly; more levels are not seen at this size
_INK = _GREYS
_BOX = _GREYS + 1
_GAP = 2
_CAPTION = 13
_KINDS = ("needle", "needle", "no needle", "needle", "short insertion", "no needle")


def contact_sheet(
    *, seed: int = 0, columns: int = 5, settings: NeedleSettings | None = None
) -> PIL.Image.Image:
    """Clips with a needle, with a short insertion and without a needle, as a palette picture.

    Each row shows `columns` frames of a clip, evenly spaced, and the last frame again with its box.

    Raises:
        InputError: the settings leave out one of the kinds.
    """
    settings = settings or NeedleSettings()
    shares = settings.needle_fraction, settings.short_fraction
    if not all(0.0 < share < 1.0 for share in shares):
        raise InputError(
            f"needle and short fractions are {shares}; a contact sheet shows every kind of clip"
        )
    size = settings.size
    steps = torch.linspace(0, settings.frames - 1, columns).round().long().tolist()
    width = (columns + 1) * (size + _GAP) - _GAP
    height = len(_KINDS) * (size + _CAPTION + _GAP) - _GAP
    sheet = PIL.Image.new("P", (width, height), 0)
    sheet.putpalette(_palette())
    draw = PIL.ImageDraw.Draw(sheet)
    for row, (clip, kind) in enumerate(zip(_pick(seed, settings), _KINDS, strict=True)):
        clips = simulate_clips(1, seed=seed, first_clip=clip, settings=settings)
        top = row * (size + _CAPTION + _GAP)
        draw.text((2, top), f"{kind} (clip {clip})", fill=_INK)
        _draw_clip(sheet, draw, clips, steps, top + _CAPTION)
    return sheet


def _pick(seed: int, settings: NeedleSettings) -> list[int]:
    """The first clips of a seed that are of the kinds shown."""
    chosen: list[int] = []
    frames = simulate_frames(16, seed=seed, settings=settings)
    known = _names(frames.has_needle, frames.is_short)
    for kind in _KINDS:
        while kind not in known:
            more = simulate_frames(16, seed=seed, first_clip=len(known), settings=settings)
            known += _names(more.has_needle, more.is_short)
        chosen.append(known.index(kind))
        known[chosen[-1]] = "shown"
    return chosen


def _names(has_needle: torch.Tensor, is_short: torch.Tensor) -> list[str]:
    return [
        "short insertion" if short else "needle" if needle else "no needle"
        for needle, short in zip(has_needle.tolist(), is_short.tolist(), strict=True)
    ]


def _draw_clip(
    sheet: PIL.Image.Image,
    draw: PIL.ImageDraw.ImageDraw,
    clips: NeedleClips,
    steps: Sequence[int],
    top: int,
) -> None:
    size = clips.frames.shape[-1]
    for column, step in enumerate([*steps, -1]):
        levels = clips.frames[0, step].numpy()
        picture = PIL.Image.fromarray((levels.astype(np.uint16) * _GREYS // 256).astype(np.uint8))
        sheet.paste(picture, (column * (size + _GAP), top))
    if clips.has_needle[0]:
        left = len(steps) * (size + _GAP)
        x0, y0, x1, y1 = clips.boxes[0, -1].tolist()
        x1, y1 = min(x1, size - 1), min(y1, size - 1)
        draw.rectangle((left + x0, top + y0, left + x1, top + y1), outline=_BOX)


def _palette() -> list[int]:
    greys = [round(255 * level / (_GREYS - 1)) for level in range(_GREYS)]
    return [value for grey in greys for value in (grey, grey, grey)] + [255, 255, 255, 255, 196, 0]
