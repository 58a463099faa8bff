"""Tissue of a clip: layers, muscle streaks, fascia lines, oblique septa and vessels.

Everything is drawn on a canvas a little larger than the field of view, so that motion never shows
its rim. Diffuse scattering is a power map (it becomes speckle); fascia, septa and vessel walls are
mirrors for the beam and are kept apart as an amplitude map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.data.needle.profiles import decibels, ramp, ridge
from attn_kd.data.needle.randomness import ClipRandom
from attn_kd.data.needle.settings import MAX_DISTRACTORS, NeedleSettings

CANVAS_MARGIN = 0.09
_INTERFACES = 6
_VESSELS = 2


@dataclass(frozen=True)
class Canvas:
    """Pixel grid of the tissue: lateral x [1, 1, Wc], depth z [1, Hc, 1], pixel pitch."""

    x: Tensor
    z: Tensor
    pitch: float

    @classmethod
    def around_view(cls, size: int, device: torch.device) -> Canvas:
        """The canvas for frames of `size` pixels; pixel centres lie on the frame's grid."""
        margin = math.ceil(CANVAS_MARGIN * size)
        line = (torch.arange(-margin, size + margin, device=device) + 0.5) / size
        return cls(line.view(1, 1, -1), line.view(1, -1, 1), 1.0 / size)

    def zeros(self, num_clips: int) -> Tensor:
        """An empty map, [N, Hc, Wc]."""
        return self.x.new_zeros(num_clips, self.z.shape[1], self.x.shape[2])


@dataclass(frozen=True)
class Vessels:
    """Centres and radii of vessels [N, V]; radius 0 where a clip has fewer."""

    x: Tensor
    z: Tensor
    radius_x: Tensor
    radius_z: Tensor


@dataclass(frozen=True)
class Tissue:
    """Scattering of the tissue before it is imaged.

    diffuse: power of the speckle, [N, Hc, Wc]; specular: amplitude of mirrors, [N, Hc, Wc].
    """

    diffuse: Tensor
    specular: Tensor
    vessels: Vessels


def sample_tissue(random: ClipRandom, canvas: Canvas, settings: NeedleSettings) -> Tissue:
    """Draw the anatomy of each clip and paint it on the canvas."""
    fold = _fold(random, canvas)
    depths = _interface_depths(random)
    curves = _interface_curves(random, canvas, depths, fold)
    level = _layers(random, canvas, curves) + _muscle_streaks(random, canvas, fold)
    specular = canvas.zeros(random.num_clips)
    _paint_fascia(random, canvas, curves, specular)
    _paint_septa(random, canvas, settings, specular)
    vessels = _sample_vessels(random)
    _carve_vessels(vessels, canvas, level, specular)
    return Tissue(decibels(2.0 * level), specular, vessels)


def _fold(random: ClipRandom, canvas: Canvas) -> Tensor:
    """Depth by which all layers are displaced along x, [N, 1, Wc]."""
    fold = random.uniform(-0.22, 0.22, 1, 1) * (canvas.x - 0.5)
    for periods in (0.8, 1.7):
        amplitude = random.uniform(0.0, 0.035 / periods, 1, 1)
        fold = fold + amplitude * _wave(random, canvas, periods)
    return fold


def _wave(random: ClipRandom, canvas: Canvas, periods: float, *shape: int) -> Tensor:
    """A sinusoid along x with a random phase, [N, *shape, 1, Wc]."""
    phase = random.uniform(0.0, 2 * math.pi, *shape, 1, 1)
    return torch.sin(2 * math.pi * periods * canvas.x + phase)


def _interface_depths(random: ClipRandom) -> Tensor:
    """Depths of the skin's lower edge and of the layers below it, [N, K]."""
    skin = random.uniform(0.02, 0.05, 1)
    steps = random.uniform(0.05, 0.30, _INTERFACES - 1)
    return torch.cat([skin, skin + steps.cumsum(1)], dim=1)


def _interface_curves(random: ClipRandom, canvas: Canvas, depths: Tensor, fold: Tensor) -> Tensor:
    """Depth of each interface along x, [N, K, 1, Wc]; flat at the probe, folded below."""
    depth = depths[..., None, None]
    tilt = random.uniform(-0.12, 0.12, _INTERFACES, 1, 1) * (canvas.x - 0.5)
    ripple = random.uniform(0.0, 0.008, _INTERFACES, 1, 1) * _wave(random, canvas, 2.6, _INTERFACES)
    return depth + _fold_share(depth) * (fold[:, None] + tilt + ripple)


def _fold_share(depth: Tensor) -> Tensor:
    """How much of the fold a depth takes part in: the probe presses the surface flat."""
    return (depth / 0.3).clamp(0.0, 1.0)


def _layers(random: ClipRandom, canvas: Canvas, curves: Tensor) -> Tensor:
    """Level of the diffuse scattering in each layer, dB, [N, Hc, Wc]."""
    levels = random.uniform(-50.0, -27.0, _INTERFACES + 1)
    levels[:, 0] = random.uniform(-22.0, -12.0)
    levels[:, 1] = random.uniform(-40.0, -28.0)
    steps = levels.diff(dim=1)
    level = canvas.zeros(random.num_clips) + levels[:, :1, None]
    for k in range(_INTERFACES):
        level.addcmul_(ramp(canvas.z - curves[:, k], 0.02), steps[:, k, None, None])
    return level


def _muscle_streaks(random: ClipRandom, canvas: Canvas, fold: Tensor) -> Tensor:
    """Short bright streaks of connective tissue along the layers, dB, [N, Hc, Wc]."""
    rows = 96
    coarse = random.normal(1, rows, 14)
    # The noise covers [-0.1, 1.1] of the field of view; it bends with the layers.
    grid = canvas.x.new_empty(random.num_clips, canvas.z.shape[1], canvas.x.shape[2], 2)
    grid[..., 0] = (canvas.x - 0.5) / 0.6
    grid[..., 1] = (canvas.z - 0.5 - fold * _fold_share(canvas.z)) / 0.6
    streaks = F.grid_sample(coarse, grid, padding_mode="reflection", align_corners=False)[:, 0]
    contrast = random.uniform(4.0, 15.0, 1, 1)
    return streaks.sub_(0.3).clamp_(min=-0.5).mul_(contrast)


def _paint_fascia(random: ClipRandom, canvas: Canvas, curves: Tensor, specular: Tensor) -> None:
    """Add the bright lines between layers, some of them double."""
    level = random.uniform(-26.0, -3.0, _INTERFACES, 1, 1)
    level = level + 5.0 * (
        _wave(random, canvas, 0.9, _INTERFACES) + _wave(random, canvas, 2.7, _INTERFACES)
    )
    inverse_width = 1.0 / random.uniform(0.0045, 0.0085, _INTERFACES, 1, 1)
    double = random.chance(0.4, _INTERFACES)
    gap = random.uniform(0.022, 0.045, _INTERFACES, 1, 1)
    weaker = random.uniform(2.0, 12.0, _INTERFACES, 1, 1)
    everywhere = torch.ones_like(double)
    _paint_lines(specular, canvas.z, curves, inverse_width, decibels(level), everywhere)
    _paint_lines(specular, canvas.z, curves + gap, inverse_width, decibels(level - weaker), double)


def _paint_lines(
    specular: Tensor,
    z: Tensor,
    curves: Tensor,
    inverse_width: Tensor,
    amplitude: Tensor,
    present: Tensor,
) -> None:
    """Add lines that follow `curves` [N, K, 1, Wc], where `present` [N, K]; others cost nothing."""
    for k in range(present.shape[1]):
        clips = present[:, k].nonzero()[:, 0]
        if clips.numel():
            inverse = inverse_width[clips, k]
            distance = z * inverse - curves[clips, k] * inverse
            specular.index_add_(0, clips, ridge(distance).mul_(amplitude[clips, k]))


def _paint_septa(
    random: ClipRandom, canvas: Canvas, settings: NeedleSettings, specular: Tensor
) -> None:
    """Add oblique septa: static bright lines that resemble a needle in a single frame."""
    count = MAX_DISTRACTORS
    present = random.chance(settings.distractors / count, count)
    shape = (count, 1, 1)
    angle = random.sign(*shape) * random.uniform(math.radians(8), math.radians(42), *shape)
    centre_x = random.uniform(0.12, 0.88, *shape)
    centre_z = random.uniform(0.2, 0.85, *shape)
    half_length = random.uniform(0.08, 0.25, *shape)
    bend = random.uniform(-0.35, 0.35, *shape)
    level = random.uniform(-20.0, -4.0, *shape) + 3.0 * _wave(random, canvas, 2.3, count)
    width = random.uniform(0.006, 0.010, *shape)

    across = canvas.x - centre_x
    along = across / torch.cos(angle)
    curves = centre_z + across * torch.tan(angle) + bend * along.square()
    amplitude = decibels(level) * ramp(half_length - along.abs(), 0.05)
    _paint_lines(specular, canvas.z, curves, torch.cos(angle) / width, amplitude, present)


def _sample_vessels(random: ClipRandom) -> Vessels:
    present = random.chance(0.45, _VESSELS)
    radius_z = random.uniform(0.03, 0.10, _VESSELS) * present
    return Vessels(
        x=random.uniform(0.1, 0.9, _VESSELS),
        z=random.uniform(0.25, 0.8, _VESSELS),
        radius_x=radius_z * random.uniform(1.0, 1.6, _VESSELS),
        radius_z=radius_z,
    )


def _carve_vessels(vessels: Vessels, canvas: Canvas, level: Tensor, specular: Tensor) -> None:
    """Dark lumen, wall brightest where it faces the beam, enhancement below."""
    for k in range(_VESSELS):
        clips = (vessels.radius_z[:, k] > 0).nonzero()[:, 0]
        if not clips.numel():
            continue
        radius_z = vessels.radius_z[clips, k, None, None]
        across = (canvas.x - vessels.x[clips, k, None, None]) / vessels.radius_x[
            clips, k, None, None
        ]
        down = (canvas.z - vessels.z[clips, k, None, None]) / radius_z
        ring = (across.square() + down.square()).sqrt_()
        lumen = ramp((1.0 - ring) * radius_z, 0.025)
        outside = 1.0 - lumen
        below = ramp(1.0 - across.abs(), 0.4) * down.clamp(0.0, 1.0)
        level[clips] += 4.0 * below * outside - 24.0 * lumen
        facing = (down / ring.clamp(min=0.1)).square_().square_()
        wall = ridge((ring - 1.0) * (radius_z / 0.006)) * facing
        specular[clips] = specular[clips] * outside + 0.16 * wall
