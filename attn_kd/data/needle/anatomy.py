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
_LAYERS = 5
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
    stratum = canvas.z - fold * (canvas.z / 0.3).clamp(0.0, 1.0)
    depths = _interface_depths(random)
    level, specular = _layers(random, canvas, stratum, depths)
    level = level + _muscle_streaks(random, canvas, stratum)
    specular = specular + _septa(random, canvas, settings)
    vessels = _sample_vessels(random)
    level, specular = _carve_vessels(vessels, canvas, level, specular)
    return Tissue(decibels(2.0 * level), specular, vessels)


def _fold(random: ClipRandom, canvas: Canvas) -> Tensor:
    """Depth by which all layers are displaced along x, [N, 1, Wc]."""
    slope = random.uniform(-0.22, 0.22, 1, 1)
    fold = slope * (canvas.x - 0.5)
    for periods in (0.8, 1.7):
        amplitude = random.uniform(0.0, 0.035 / periods, 1, 1)
        phase = random.uniform(0.0, 2 * math.pi, 1, 1)
        fold = fold + amplitude * torch.sin(2 * math.pi * periods * canvas.x + phase)
    return fold


def _interface_depths(random: ClipRandom) -> Tensor:
    """Depths of skin, fat, and muscle boundaries, [N, layers]."""
    skin = random.uniform(0.03, 0.07, 1)
    steps = random.uniform(0.08, 0.30, _LAYERS - 1)
    return torch.cat([skin, skin + steps.cumsum(1)], dim=1)


def _layers(
    random: ClipRandom, canvas: Canvas, stratum: Tensor, depths: Tensor
) -> tuple[Tensor, Tensor]:
    """Level of each layer [dB] and the fascia lines between them, both [N, Hc, Wc]."""
    levels = random.uniform(-46.0, -24.0, _LAYERS + 1)
    levels[:, 0] = random.uniform(-20.0, -10.0)
    levels[:, 1] = random.uniform(-36.0, -26.0)
    fascia_level = random.uniform(-22.0, 0.0, _LAYERS)
    thickness = random.uniform(0.7, 1.5, _LAYERS) * 0.008
    tilt = random.uniform(-0.10, 0.10, _LAYERS)
    doubled = random.chance(0.4, _LAYERS).float() * random.uniform(0.2, 0.9, _LAYERS)
    gap = random.uniform(0.022, 0.04, _LAYERS)

    level = levels[:, 0].view(-1, 1, 1).expand_as(stratum).clone()
    specular = torch.zeros_like(level)
    for k in range(_LAYERS):
        tilted = tilt[:, k].view(-1, 1, 1) * (canvas.x - 0.5) * min(k, 1)
        distance = stratum - depths[:, k].view(-1, 1, 1) - tilted
        step = (levels[:, k + 1] - levels[:, k]).view(-1, 1, 1)
        level += step * ramp(distance, 0.02)
        width = thickness[:, k].view(-1, 1, 1)
        brightness = decibels(fascia_level[:, k]).view(-1, 1, 1) * _patches(random, canvas)
        second = doubled[:, k].view(-1, 1, 1)
        specular += brightness * ridge(distance, width)
        specular += brightness * second * ridge(distance - gap[:, k].view(-1, 1, 1), width)
    return level, specular


def _patches(random: ClipRandom, canvas: Canvas) -> Tensor:
    """Brightness along x of a reflector that turns towards and away from the beam, [N, 1, Wc]."""
    wave = torch.zeros(random.num_clips, 1, canvas.x.shape[-1], device=random.device)
    for periods in (1.1, 2.3, 5.0):
        phase = random.uniform(0.0, 2 * math.pi, 1, 1)
        wave = wave + torch.sin(2 * math.pi * periods * canvas.x + phase)
    return torch.sigmoid(2.0 * wave + random.uniform(0.0, 3.0, 1, 1))


def _muscle_streaks(random: ClipRandom, canvas: Canvas, stratum: Tensor) -> Tensor:
    """Short bright streaks of connective tissue along the layers, in dB, [N, Hc, Wc]."""
    rows, columns = stratum.shape[-2:]
    coarse = random.normal(1, round(0.45 / canvas.pitch), 20)
    grid_x = (canvas.x.expand(1, rows, columns) - 0.5) * 1.6
    grid_z = (stratum - 0.5) * 1.6
    grid = torch.stack([grid_x.expand_as(grid_z), grid_z], dim=-1)
    streaks = F.grid_sample(coarse, grid, padding_mode="reflection", align_corners=False)[:, 0]
    contrast = random.uniform(3.0, 16.0, 1, 1)
    return contrast * (streaks - 0.4).clamp(min=-0.4)


def _septa(random: ClipRandom, canvas: Canvas, settings: NeedleSettings) -> Tensor:
    """Oblique septa: static bright lines that resemble a needle in a single frame, [N, Hc, Wc]."""
    count = MAX_DISTRACTORS
    present = random.chance(settings.distractors / count, count)
    angle = random.sign(count) * random.uniform(math.radians(8), math.radians(42), count)
    centre_x = random.uniform(0.0, 1.0, count)
    centre_z = random.uniform(0.2, 0.85, count)
    half_length = random.uniform(0.08, 0.32, count)
    bend = random.uniform(-0.25, 0.25, count)
    level = random.uniform(-16.0, 0.0, count)
    width = random.uniform(0.7, 1.3, count) * 0.009
    amplitude = decibels(level) * present

    specular = torch.zeros(random.num_clips, *_canvas_shape(canvas), device=random.device)
    for k in range(count):

        def of(values: Tensor, k: int = k) -> Tensor:
            return values[:, k].view(-1, 1, 1)

        along = (canvas.x - of(centre_x)) / torch.cos(of(angle))
        line = of(centre_z) + (canvas.x - of(centre_x)) * torch.tan(of(angle))
        line = line + of(bend) * along.square()
        ends = ramp(of(half_length) - along.abs(), 0.04)
        specular += (
            of(amplitude) * ends * ridge((canvas.z - line) * torch.cos(of(angle)), of(width))
        )
    return specular


def _canvas_shape(canvas: Canvas) -> tuple[int, int]:
    return canvas.z.shape[1], canvas.x.shape[2]


def _sample_vessels(random: ClipRandom) -> Vessels:
    present = random.uniform(0.0, 1.0, _VESSELS) < 0.45
    radius_z = random.uniform(0.035, 0.10, _VESSELS) * present
    return Vessels(
        x=random.uniform(0.1, 0.9, _VESSELS),
        z=random.uniform(0.25, 0.8, _VESSELS),
        radius_x=radius_z * random.uniform(1.0, 1.6, _VESSELS),
        radius_z=radius_z,
    )


def _carve_vessels(
    vessels: Vessels, canvas: Canvas, level: Tensor, specular: Tensor
) -> tuple[Tensor, Tensor]:
    """Dark lumen, wall brightest where it faces the beam, enhancement below."""
    for k in range(_VESSELS):
        exists = (vessels.radius_z[:, k] > 0).view(-1, 1, 1)
        radius_x = vessels.radius_x[:, k].clamp(min=0.01).view(-1, 1, 1)
        radius_z = vessels.radius_z[:, k].clamp(min=0.01).view(-1, 1, 1)
        across = (canvas.x - vessels.x[:, k].view(-1, 1, 1)) / radius_x
        down = (canvas.z - vessels.z[:, k].view(-1, 1, 1)) / radius_z
        ring = (across.square() + down.square()).sqrt()
        lumen = ramp((1.0 - ring) * radius_z, 0.02) * exists
        below = ((1.0 - across.abs()) * 3).clamp(0.0, 1.0) * down.clamp(0.0, 1.0) * exists
        level = level - 26.0 * lumen + 4.0 * below * (1 - lumen)
        facing = down.abs() / ring.clamp(min=1e-3)
        wall = ridge((ring - 1.0) * radius_z, 0.009) * facing.square()
        specular = specular * (1 - lumen) + 0.35 * wall * exists
    return level, specular
