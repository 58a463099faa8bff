"""The needle's path: where it enters, at what angle, and how far its tip has come in each frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kd.data.needle.motion import smooth_curve
from attn_kd.data.needle.randomness import ClipRandom
from attn_kd.data.needle.settings import SHORTEST_LONG, NeedleSettings

_DEEPEST = 0.93
_FARTHEST = 0.95


@dataclass(frozen=True)
class Needles:
    """Needles of N clips over T frames, in the field of view's unit square.

    present, short: [N] bool; from_right: [N] bool, enters at x = 1 instead of x = 0.
    angle: [N, T] below the horizontal in radians; entry_depth: [N, T]; length: visible length
    [N, T], at most 0 while the tip has not reached the field of view.
    """

    present: Tensor
    short: Tensor
    from_right: Tensor
    angle: Tensor
    entry_depth: Tensor
    length: Tensor

    def visible(self) -> Tensor:
        """Whether a frame shows the needle, [N, T] bool."""
        return self.present[:, None] & (self.length > 0)

    def boxes(self, size: int, minimum_thickness: float) -> Tensor:
        """Extent of the visible needle, xyxy in pixels, [N, T, 4] float32; NaN where none is."""
        tip_x = self.length * torch.cos(self.angle)
        tip_z = self.entry_depth + self.length * torch.sin(self.angle)
        low_z, high_z = _widen(self.entry_depth, tip_z, minimum_thickness)
        low_x, high_x = torch.zeros_like(tip_x), tip_x.clamp(min=minimum_thickness)
        right = self.from_right[:, None]
        low_x, high_x = torch.where(right, 1 - high_x, low_x), torch.where(right, 1 - low_x, high_x)
        boxes = torch.stack([low_x, low_z, high_x, high_z], dim=-1).clamp(0.0, 1.0) * size
        return boxes.masked_fill(~self.visible()[..., None], math.nan)


def _widen(low: Tensor, high: Tensor, minimum: float) -> tuple[Tensor, Tensor]:
    """Grow an interval about its centre to at least `minimum`."""
    missing = (minimum - (high - low)).clamp(min=0.0) / 2
    return low - missing, high + missing


def sample_needles(
    random: ClipRandom, times: Tensor, depth_shift: Tensor, settings: NeedleSettings
) -> Needles:
    """Draw one trajectory per clip at `times` [T]; `depth_shift` [N, T] is the probe's motion."""
    present = random.chance(settings.needle_fraction)
    short = random.chance(settings.short_fraction) & present
    from_right = random.chance(0.5)
    angle = random.uniform(math.radians(12.0), math.radians(52.0), 1)
    share = random.uniform(0.0, 1.0, 1)
    deepest_entry = _DEEPEST - 0.05 - SHORTEST_LONG * torch.sin(angle)
    entry = 0.08 + share * (deepest_entry.clamp(max=0.6) - 0.08)
    final_length = _final_length(random, short, angle, entry, settings)

    wobble = math.radians(1.0) * smooth_curve(random, times, 1)[..., 0]
    fidget = random.uniform(0.005, 0.02, 1) * smooth_curve(random, times, 1)[..., 0]
    fidget = fidget - fidget[:, -1:]
    length = final_length - _still_to_go(random, times) + fidget
    return Needles(
        present=present,
        short=short,
        from_right=from_right,
        angle=angle + wobble,
        entry_depth=entry - depth_shift,
        length=length,
    )


def _final_length(
    random: ClipRandom, short: Tensor, angle: Tensor, entry: Tensor, settings: NeedleSettings
) -> Tensor:
    """Visible length in the last frame, [N, 1]: the tip stays inside the field of view."""
    longest = torch.minimum(_FARTHEST / torch.cos(angle), (_DEEPEST - entry) / torch.sin(angle))
    share = random.uniform(0.0, 1.0, 1)
    low, high = settings.short_length
    long = SHORTEST_LONG + share * (longest - SHORTEST_LONG).clamp(min=0.0)
    return torch.where(short[:, None], low + share * (high - low), long)


def _still_to_go(random: ClipRandom, times: Tensor) -> Tensor:
    """Length that the needle still advances after each frame, [N, T], 0 at the last."""
    advance = random.uniform(0.06, 0.45, 1)
    start = random.uniform(-0.6, 0.5, 1)
    duration = random.uniform(0.5, 1.2, 1)
    progress = ((times - start) / duration).clamp(0.0, 1.0)
    progress = progress * progress * (3.0 - 2.0 * progress)
    return advance * (progress[:, -1:] - progress)
