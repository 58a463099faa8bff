"""Motion of tissue relative to the probe over a clip: hand jitter, breathing, pulsation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
    device = motion.coefficients.device
    line = (torch.arange(size, device=device) + 0.5) / size
    z, x = torch.meshgrid(line, line, indexing="ij")
    coefficients = motion.coefficients[:, frames]
    modes = _modes(x, z)
    shift = (coefficients.flatten(0, 1) @ modes.flatten(1)).view(
        *coefficients.shape[:2], size, size, 2
    )
    pulse = (
        motion.pulsation[:, frames, None, None, None]
        * _pulsation_mode(motion.vessels, x, z)[:, None]
    )
    position = torch.stack([x, z], dim=-1) + shift + pulse
    margin = math.ceil(CANVAS_MARGIN * size) / size
    return (position - 0.5) * (2.0 / (1.0 + 2.0 * margin))


def _modes(x: Tensor, z: Tensor) -> Tensor:
    """Shapes of displacement, [M, S, S, 2]: shift x, shift z, rotate, compress, shear, bend."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack(
        [
            torch.stack([one, zero], -1),
            torch.stack([zero, one], -1),
            torch.stack([0.5 - z, x - 0.5], -1),
            torch.stack([zero, z], -1),
            torch.stack([z - 0.5, zero], -1),
            torch.stack([zero, torch.sin(math.pi * x) * z], -1),
        ]
    )


def _pulsation_mode(vessels: Vessels, x: Tensor, z: Tensor) -> Tensor:
    """Displacement away from vessel centres that fades with distance, [N, S, S, 2]."""
    mode = torch.zeros(vessels.x.shape[0], *x.shape, 2, device=x.device)
    for k in range(vessels.x.shape[1]):
        radius = vessels.radius_z[:, k].view(-1, 1, 1)
        away_x = x - vessels.x[:, k].view(-1, 1, 1)
        away_z = z - vessels.z[:, k].view(-1, 1, 1)
        reach = radius.clamp(min=0.01)
        strength = (radius > 0) * ridge((away_x.square() + away_z.square()).sqrt(), reach) / reach
        mode -= torch.stack([away_x * strength, away_z * strength], dim=-1)
    return mode
