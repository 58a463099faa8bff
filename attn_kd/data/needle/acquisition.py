"""How the scanner turns scattering into an image: point spread function, gain, log compression.

The echo is held as complex baseband (in-phase and quadrature after the carrier is removed), where
the pulse is its Gaussian envelope. Many scatterers per resolution cell make both parts Gaussian, so
the magnitude is Rayleigh distributed: fully developed speckle (Wagner et al. 1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kd.data.needle.anatomy import Canvas, Tissue
from attn_kd.data.needle.profiles import decibels, ridge
from attn_kd.data.needle.randomness import ClipRandom

_AXIAL_WIDTH = 0.0055
_LATERAL_WIDTH = 0.0075
_FOCUS = 0.35
_RAYLEIGH_RANGE = 0.38


@dataclass(frozen=True)
class Scanner:
    """Settings of the scanner per clip, all [N, 1, 1] or [N, S, S] for `gain`.

    gain: level of the signal at each depth after attenuation and time-gain compensation and under
    poor probe contact, amplitude; noise: amplitude of the electronic noise, grows with depth.
    """

    gain: Tensor
    noise: Tensor
    dynamic_range: Tensor
    brightness: Tensor


def lateral_width(depth: Tensor) -> Tensor:
    """Standard deviation of the beam across x: smallest at the focus (Gaussian beam)."""
    return _LATERAL_WIDTH * (1.0 + ((depth - _FOCUS) / _RAYLEIGH_RANGE).square()).sqrt()


AXIAL_WIDTH = _AXIAL_WIDTH


def sample_scanner(random: ClipRandom, size: int) -> Scanner:
    """Draw the scanner's settings for frames of `size` pixels."""
    line = (torch.arange(size, device=random.device) + 0.5) / size
    x, z = line.view(1, 1, -1), line.view(1, -1, 1)
    attenuation = random.uniform(18.0, 46.0, 1, 1)
    compensation = attenuation * random.uniform(0.45, 1.0, 1, 1)
    knee = random.uniform(-3.0, 3.0, 1, 1) * torch.cos(
        2 * math.pi * (z * random.uniform(0.6, 1.6, 1, 1) + random.uniform(0.0, 1.0, 1, 1))
    )
    contact_x = random.uniform(-0.1, 1.1, 1, 1)
    contact_width = random.uniform(0.04, 0.14, 1, 1)
    contact_loss = random.chance(0.3, 1, 1) * random.uniform(4.0, 18.0, 1, 1)
    shadow = contact_loss * ridge(x - contact_x, contact_width)
    level = (compensation - attenuation) * z + knee - shadow
    noise_level = random.uniform(-68.0, -54.0, 1, 1) + compensation * z.square()
    return Scanner(
        gain=decibels(level),
        noise=decibels(noise_level),
        dynamic_range=random.uniform(48.0, 62.0, 1, 1),
        brightness=random.uniform(-4.0, 5.0, 1, 1),
    )


@dataclass(frozen=True)
class ElectronicNoise:
    """One complex noise field per clip [N, 2, S, S], rolled by `offsets` [T][2] in each frame."""

    field: Tensor
    offsets: list[list[int]]

    def frames(self, frames: slice) -> Tensor:
        """The noise of some frames, [N, T, 2, S, S]."""
        rolled = [torch.roll(self.field, offset, dims=(2, 3)) for offset in self.offsets[frames]]
        return torch.stack(rolled, dim=1)


def sample_noise(random: ClipRandom, size: int, num_frames: int) -> ElectronicNoise:
    """Draw the noise field; rolling it is twenty times cheaper than drawing it for every frame."""
    steps = torch.randint(size, (num_frames, 2), generator=torch.Generator().manual_seed(0))
    return ElectronicNoise(random.normal(2, size, size), steps.tolist())


def image_tissue(random: ClipRandom, tissue: Tissue, canvas: Canvas) -> Tensor:
    """Complex echo of the tissue on the canvas, [N, 2, Hc, Wc] (in-phase, quadrature)."""
    scatterers = random.normal(2, *tissue.diffuse.shape[1:])
    scatterers *= tissue.diffuse.sqrt().unsqueeze(1) * math.sqrt(0.5)
    echo = _blur_lateral(_blur_axial(scatterers, canvas), canvas)
    echo[:, 0] += tissue.specular
    return echo


def _blur_axial(field: Tensor, canvas: Canvas) -> Tensor:
    """Convolve depth with the pulse envelope; power is kept."""
    sigma = _AXIAL_WIDTH / canvas.pitch
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    taps = (taps / taps.square().sum().sqrt()).tolist()
    rows = field.shape[2]
    blurred = field * taps[reach]
    for offset in range(1, reach + 1):
        blurred[:, :, offset:].add_(field[:, :, : rows - offset], alpha=taps[reach - offset])
        blurred[:, :, : rows - offset].add_(field[:, :, offset:], alpha=taps[reach + offset])
    return blurred


def _blur_lateral(field: Tensor, canvas: Canvas) -> Tensor:
    """Convolve x with the beam profile of each depth; power is kept."""
    sigma = lateral_width(canvas.z[0]) / canvas.pitch  # [Hc, 1]
    reach = math.ceil(2.5 * float(sigma.max()))
    offsets = torch.arange(-reach, reach + 1, device=field.device)
    taps = torch.exp(-0.5 * (offsets / sigma).square())
    taps = taps / taps.square().sum(1, keepdim=True).sqrt()  # [Hc, 2 * reach + 1]
    columns = field.shape[3]
    blurred = field * taps[:, reach, None]
    for offset in range(1, reach + 1):
        weight = taps[:, reach + offset, None]
        blurred[..., offset:].addcmul_(field[..., : columns - offset], weight)
        blurred[..., : columns - offset].addcmul_(field[..., offset:], weight)
    return blurred


def compress(echo: Tensor, noise: Tensor, scanner: Scanner) -> Tensor:
    """Envelope and log compression of echo [N, T, 2, S, S] to uint8 [N, T, S, S]."""
    echo = torch.addcmul(echo, noise, scanner.noise[:, None, None])
    power = echo.square_().sum(2)
    level = power.clamp_(min=1e-12).log10_().mul_(10.0)
    level += scanner.brightness[:, None]
    grey = level.div_(scanner.dynamic_range[:, None]).add_(1.0).clamp_(0.0, 1.0)
    return grey.mul_(255.0).round_().to(torch.uint8)
