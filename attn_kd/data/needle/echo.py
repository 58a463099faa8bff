"""The needle's echo: specular shaft, bright tip, reverberation below it, and its shadow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kd.data.needle.acquisition import AXIAL_WIDTH, lateral_width
from attn_kd.data.needle.motion import smooth_curve
from attn_kd.data.needle.profiles import decibels, ramp, ridge
from attn_kd.data.needle.randomness import ClipRandom
from attn_kd.data.needle.settings import NeedleSettings
from attn_kd.data.needle.trajectory import Needles

_SPECULAR_LOSS = 13.0  # dB at 45 degrees from perpendicular


@dataclass(frozen=True)
class NeedleLook:
    """Appearance of a needle: level [N, T] in dB; the rest [N, 1, 1, 1] or per wave [N, W]."""

    level: Tensor
    gauge: Tensor
    ringing: Tensor
    ringing_decay: Tensor
    shadow: Tensor
    tip: Tensor
    wave_rate: Tensor
    wave_phase: Tensor


def sample_look(
    random: ClipRandom, times: Tensor, needles: Needles, settings: NeedleSettings
) -> NeedleLook:
    """Draw the appearance; steep needles send less of the beam back to the probe."""
    steepness = needles.angle / math.radians(45.0)
    drift = random.uniform(0.5, 3.5, 1) * smooth_curve(random, times, 1)[..., 0]
    level = random.uniform(*settings.needle_level, 1) - _SPECULAR_LOSS * steepness.square() + drift
    return NeedleLook(
        level=level,
        gauge=random.uniform(0.024, 0.042, 1, 1, 1),
        ringing=decibels(random.uniform(-28.0, -10.0, 1, 1, 1)),
        ringing_decay=random.uniform(0.012, 0.06, 1, 1, 1),
        shadow=random.uniform(0.25, 0.75, 1, 1, 1),
        tip=random.uniform(0.0, 1.2, 1, 1, 1),
        wave_rate=random.uniform(3.0, 24.0, 3),
        wave_phase=random.uniform(0.0, 2 * math.pi, 3),
    )


def needle_echo(
    needles: Needles, look: NeedleLook, frames: slice, size: int
) -> tuple[Tensor, Tensor]:
    """Echo amplitude of the needle and transmission of the tissue's echo, both [N, T, S, S]."""
    line = (torch.arange(size, device=needles.angle.device) + 0.5) / size
    x, z = line.view(1, 1, 1, -1), line.view(1, 1, -1, 1)
    angle = needles.angle[:, frames, None, None]
    length = needles.length[:, frames, None, None]
    travelled = torch.where(needles.from_right.view(-1, 1, 1, 1), 1.0 - x, x)
    shaft_z = needles.entry_depth[:, frames, None, None] + travelled * torch.tan(angle)
    from_tip = length - travelled / torch.cos(angle)  # [N, T, 1, S], positive along the shaft
    inside = ramp(from_tip, 0.02)
    behind = ramp(from_tip - 0.01, 0.05)  # what lies below the shaft blurs with depth

    below = z - shaft_z  # [N, T, S, S]
    blur = (AXIAL_WIDTH * torch.cos(angle)).square()
    blur = blur + (lateral_width(shaft_z) * torch.sin(angle)).square()
    width = (blur + 0.005**2).sqrt() / torch.cos(angle)
    level = decibels(look.level[:, frames, None, None])
    glint = 1.0 + look.tip * ridge(from_tip / 0.015)
    amplitude = level * glint * _texture(look, from_tip)

    profile = ridge(below / width)
    echo = amplitude * (inside * profile + behind * _reverberation(look, below))
    transmission = 1.0 - look.shadow * behind * ramp(below, 0.02)
    return echo, transmission


def _texture(look: NeedleLook, from_tip: Tensor) -> Tensor:
    """Bright and dull stretches fixed to the shaft, [N, T, 1, S]."""
    wave = torch.zeros_like(from_tip)
    for k in range(look.wave_rate.shape[1]):
        rate = look.wave_rate[:, k].view(-1, 1, 1, 1)
        phase = look.wave_phase[:, k].view(-1, 1, 1, 1)
        wave = wave + torch.sin(rate * from_tip + phase)
    return torch.sigmoid(1.5 * wave + 1.0)


def _reverberation(look: NeedleLook, below: Tensor) -> Tensor:
    """Echoes of the far wall: lines one gauge apart that fade with depth (comet tail)."""
    decay = torch.exp(-below.clamp(min=0.0) / look.ringing_decay)
    lines = 0.65 + 0.35 * torch.cos(below * (2 * math.pi / look.gauge))
    return look.ringing * decay * lines * ramp(below, 0.015)
