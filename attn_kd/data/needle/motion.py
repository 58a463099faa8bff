"""Motion of tissue relative to the probe over a clip: hand jitter, breathing, pulsation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.data.needle.anatomy import CANVAS_MARGIN, Vessels
from attn_kd.data.needle.profiles import ridge
from attn_kd.data.needle.randomness import ClipRandom

# Amplitude of each displacement mode as a share of the field of view, in the order of _modes().
_AMPLITUDES = (0.010, 0.010, 0.012, 0.014, 0.010, 0.010)
_PULSATION = 0.012


def smooth_curve(random: ClipRandom, times: Tensor, *shape: int) -> Tensor:
    """Random smooth functions of time of about unit size, [N, T, *shape].

    A sum of three sinusoids: breathing-like drift (0.3 Hz), sway (1 Hz) and tremor (3 Hz).
    """
    time = times.view(1, -1, *[1] * len(shape))
    curve = torch.zeros(1, device=times.device)
    for hertz, amplitude in ((0.3, 0.8), (1.1, 0.5), (3.0, 0.15)):
        rate = hertz * random.uniform(0.6, 1.4, *shape).unsqueeze(1)
        phase = random.uniform(0.0, 2 * math.pi, *shape).unsqueeze(1)
        curve = curve + amplitude * torch.sin(2 * math.pi * rate * time + phase)
    return curve


@dataclass(frozen=True)
class TissueMotion:
    """Displacement of the tissue: coefficients of fixed modes [N, T, M] and of pulsation [N, T]."""

    coefficients: Tensor
    pulsation: Tensor
    vessels: Vessels

    @property
    def depth_shift(self) -> Tensor:
        """Displacement of the whole view in depth, [N, T]; the needle takes part in it."""
        return self.coefficients[..., 1]


def sample_motion(random: ClipRandom, times: Tensor, vessels: Vessels) -> TissueMotion:
    """Draw the motion of each clip at `times` [T] in seconds."""
    amplitudes = torch.tensor(_AMPLITUDES, device=random.device)
    vigour = random.uniform(0.2, 1.0, 1, 1)
    coefficients = smooth_curve(random, times, len(_AMPLITUDES)) * amplitudes * vigour
    rate = random.uniform(1.0, 1.8, 1)
    phase = random.uniform(0.0, 2 * math.pi, 1)
    beat = torch.sin(2 * math.pi * rate * times + phase).clamp(min=0.0)
    return TissueMotion(coefficients, _PULSATION * beat, vessels)


def sampling_grid(motion: TissueMotion, frames: slice, size: int) -> Tensor:
    """Where each pixel of the frames looks on the canvas, for grid_sample, [N, T, S, S, 2]."""
    line = (torch.arange(size, device=motion.coefficients.device) + 0.5) / size
    # grid_sample's coordinates span [-1, 1] from rim to rim of the canvas.
    scale = 2.0 / (1.0 + 2.0 * math.ceil(CANVAS_MARGIN * size) / size)
    modes = _modes(line).mul_(scale)
    coefficients = F.pad(motion.coefficients[:, frames], (1, 0), value=1.0)
    num_clips, num_frames = coefficients.shape[:2]
    grid = (coefficients.flatten(0, 1) @ modes.flatten(1)).view(
        num_clips, num_frames, size, size, 2
    )
    pulsation = scale * motion.pulsation[:, frames, None, None, None]
    return grid.addcmul_(pulsation, _pulsation_mode(motion.vessels, line)[:, None])


def _modes(line: Tensor) -> Tensor:
    """Rest position and shapes of displacement, [1 + M, S, S, 2].

    The shapes: shift x, shift z, rotate, compress, shear, bend.
    """
    z, x = torch.meshgrid(line, line, indexing="ij")
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    shapes = [
        (x - 0.5, z - 0.5),
        (one, zero),
        (zero, one),
        (0.5 - z, x - 0.5),
        (zero, z),
        (z - 0.5, zero),
        (zero, torch.sin(math.pi * x) * z),
    ]
    return torch.stack([torch.stack(shape, dim=-1) for shape in shapes])


def _pulsation_mode(vessels: Vessels, line: Tensor) -> Tensor:
    """Displacement away from vessel centres that fades with distance, [N, S, S, 2].

    A Gaussian is a product of its two directions, so the mode is a sum of outer products.
    """
    reach = vessels.radius_z.clamp(min=0.01)[..., None]
    away_x = (line - vessels.x[..., None]) / reach  # [N, V, S]
    away_z = (line - vessels.z[..., None]) / reach
    bump_x = ridge(away_x) * (vessels.radius_z[..., None] > 0)
    bump_z = ridge(away_z)
    mode_x = torch.einsum("nvz,nvx->nzx", bump_z, bump_x * away_x)
    mode_z = torch.einsum("nvz,nvx->nzx", bump_z * away_z, bump_x)
    return -torch.stack([mode_x, mode_z], dim=-1)
