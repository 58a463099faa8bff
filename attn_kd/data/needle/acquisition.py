"""How the scanner turns scattering into an image: point spread function, gain, log compression.

The echo is held as complex baseband (in-phase and quadrature after the carrier is removed), where
the pulse is its Gaussian envelope. Many scatterers per resolution cell make both parts Gaussian, so
the magnitude is Rayleigh distributed: fully developed speckle (Wagner et al. 1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attn_kd.data.needle.anatomy import Canvas, Tissue
from attn_kd.data.needle.profiles import decibels, ridge
from attn_kd.data.needle.randomness import ClipRandom

# Standard deviations of the point spread function, as shares of the field of view.
AXIAL_WIDTH = 0.0058
_LATERAL_WIDTH = 0.0085  # at the focus
_FOCUS = 0.35
_RAYLEIGH_RANGE = 0.40
_ROUGHNESS = 0.5  # share of a mirror's echo that is speckle


@dataclass(frozen=True)
class Scanner:
    """Settings of the scanner per clip.

    gain: amplitude of the signal after attenuation, time-gain compensation and poor probe contact,
    [N, S, S]; noise: amplitude of the electronic noise, which the compensation lifts with depth,
    [N, S, 1]; dynamic_range, brightness: of the log compression, dB, [N, 1, 1].
    """

    gain: Tensor
    noise: Tensor
    dynamic_range: Tensor
    brightness: Tensor


def lateral_width(depth: Tensor) -> Tensor:
    """Standard deviation of the beam across x: smallest at the focus (Gaussian beam)."""
    return _LATERAL_WIDTH * (1.0 + ((depth - _FOCUS) / _RAYLEIGH_RANGE).square()).sqrt()


def sample_scanner(random: ClipRandom, size: int) -> Scanner:
    """Draw the scanner's settings for frames of `size` pixels."""
    line = (torch.arange(size, device=random.device) + 0.5) / size
    x, z = line.view(1, 1, -1), line.view(1, -1, 1)
    attenuation = random.uniform(18.0, 46.0, 1, 1)
    compensation = attenuation * random.uniform(0.45, 1.0, 1, 1)
    ripple = random.uniform(-3.0, 3.0, 1, 1) * torch.cos(
        2 * math.pi * (z * random.uniform(0.6, 1.6, 1, 1) + random.uniform(0.0, 1.0, 1, 1))
    )
    contact_x = random.uniform(-0.1, 1.1, 1, 1)
    contact_width = random.uniform(0.04, 0.14, 1, 1)
    contact_loss = random.chance(0.3, 1, 1) * random.uniform(4.0, 18.0, 1, 1)
    shadow = contact_loss * ridge((x - contact_x) / contact_width)
    level = (compensation - attenuation) * z + ripple - shadow
    noise_level = random.uniform(-72.0, -60.0, 1, 1) + compensation * z.square()
    return Scanner(
        gain=decibels(level),
        noise=decibels(noise_level),
        dynamic_range=random.uniform(48.0, 62.0, 1, 1),
        brightness=random.uniform(-5.0, 4.0, 1, 1),
    )


def image_tissue(random: ClipRandom, tissue: Tissue, canvas: Canvas) -> Tensor:
    """Complex echo of the tissue on the canvas, [N, 2, Hc, Wc] (in-phase, quadrature)."""
    scatterers = random.normal(2, *tissue.diffuse.shape[1:])
    # A mirror is rough at the scale of the wavelength: part of its echo is speckle too.
    power = torch.addcmul(tissue.diffuse, tissue.specular, tissue.specular, value=_ROUGHNESS)
    scatterers *= power.mul_(0.5).sqrt_().unsqueeze(1)
    echo = _blur_lateral(_blur_axial(scatterers, canvas), canvas)
    echo[:, 0].add_(tissue.specular, alpha=math.sqrt(1.0 - _ROUGHNESS))
    return echo


def noise_places(random: ClipRandom, num_frames: int, size: int) -> list[list[list[int]]]:
    """Where each frame reads the noise tiles, [N][T] pairs of row and column.

    A clip starts at a place of its own; the steps from frame to frame are quasi-random.
    """
    start = random.uniform(0.0, 1.0, 1, 2)
    frame = torch.arange(num_frames, device=start.device)[:, None]
    steps = frame * start.new_tensor([0.618, 0.755])
    return ((start + steps).frac() * size).long().tolist()


def add_noise(echo: Tensor, places: list[list[list[int]]], scanner: Scanner) -> None:
    """Add electronic noise to echo [N, T, 2, S, S], in place.

    One tile of complex noise serves all frames: drawing it anew would cost more than the rest of
    a frame, and no two frames read it at the same place.
    """
    size = echo.shape[-1]
    tile = _noise_tile(2 * size, echo.device)
    for clip, noise, rows_columns in zip(echo, scanner.noise, places, strict=True):
        for frame, (row, column) in zip(clip, rows_columns, strict=True):
            frame.addcmul_(tile[:, row : row + size, column : column + size], noise)


def add_rough_mirror(echo: Tensor, amplitude: Tensor, place: list[int]) -> None:
    """Add the echo [T, S, S] of a mirror with a rough surface to one clip's echo [T, 2, S, S].

    Its speckle lies still while the mirror moves through it. It is cut from one tile for all clips
    of all seeds, each at a place of its own.
    """
    size = echo.shape[-1]
    row, column = place
    speckle = _speckle_tile(2 * size, echo.device)
    speckle = speckle[:, row : row + size, column : column + size]
    echo[:, 0].addcmul_(amplitude, speckle[0])
    echo[:, 1].addcmul_(amplitude, speckle[1])


@lru_cache(maxsize=4)
def _noise_tile(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, size, size, generator=generator).to(device)


@lru_cache(maxsize=4)
def _speckle_tile(size: int, device: torch.device) -> Tensor:
    """Echo of a rough mirror of unit amplitude: a steady part and speckle."""
    canvas = Canvas.around_view(size // 2, device)
    noise = _blur_axial(_noise_tile(size, device)[None], canvas).transpose(2, 3)
    speckle = _blur_axial(noise, canvas).transpose(2, 3)[0] * math.sqrt(0.5 * _ROUGHNESS)
    speckle[0] += math.sqrt(1.0 - _ROUGHNESS)
    return speckle.contiguous()


def _blur_axial(field: Tensor, canvas: Canvas) -> Tensor:
    """Convolve depth with the pulse envelope; power is kept."""
    sigma = AXIAL_WIDTH / canvas.pitch
    reach = math.ceil(3 * sigma)
    pulse = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    taps: list[float] = (pulse / pulse.square().sum().sqrt()).tolist()
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


def compress(echo: Tensor, scanner: Scanner) -> Tensor:
    """Envelope and log compression of echo [N, T, 2, S, S] to uint8 [N, T, S, S]."""
    power = _compound(echo[:, :, 0].square().addcmul_(echo[:, :, 1], echo[:, :, 1]))
    level = power.clamp_(min=1e-12).log10_().mul_(10.0)
    level += scanner.brightness[:, None]
    grey = level.div_(scanner.dynamic_range[:, None]).add_(1.0).clamp_(0.0, 1.0)
    return grey.mul_(255.0).round_().to(torch.uint8)


def _compound(power: Tensor) -> Tensor:
    """Average neighbouring lines, as spatial compounding does: it fills the nulls of speckle."""
    smooth = power * 0.5
    smooth[..., 1:].add_(power[..., :-1], alpha=0.25)
    smooth[..., :-1].add_(power[..., 1:], alpha=0.25)
    return smooth
