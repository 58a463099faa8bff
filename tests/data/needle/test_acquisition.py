"""The physics of the picture: speckle, point spread function, angle of the needle."""

from __future__ import annotations

import math

import pytest
import torch

from attn_kd.data.needle import NeedleSettings
from attn_kd.data.needle.acquisition import image_tissue, lateral_width
from attn_kd.data.needle.anatomy import Canvas, Tissue, Vessels
from attn_kd.data.needle.echo import sample_look
from attn_kd.data.needle.randomness import ClipRandom
from attn_kd.data.needle.trajectory import Needles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def speckle() -> tuple[Canvas, torch.Tensor]:
    """The complex echo of uniform tissue, [N, 2, Hc, Wc]."""
    canvas = Canvas.around_view(128, CPU)
    uniform = torch.ones(12, canvas.z.shape[1], canvas.x.shape[2])
    nowhere = torch.zeros(12, 1)
    vessels = Vessels(nowhere, nowhere, nowhere, nowhere)
    random = ClipRandom(0, list(range(12)), CPU)
    return canvas, image_tissue(random, Tissue(uniform, torch.zeros_like(uniform), vessels), canvas)


def inner(echo: torch.Tensor) -> torch.Tensor:
    """Without the rim, where the point spread function reaches beyond the canvas."""
    return echo[..., 12:-12, 12:-12]


def test_power_is_that_of_the_tissue(speckle):
    assert inner(speckle[1]).square().sum(1).mean() == pytest.approx(1.0, rel=0.05)


def test_speckle_is_rayleigh_distributed(speckle):
    envelope = inner(speckle[1]).square().sum(1).sqrt()
    # Mean over standard deviation of a Rayleigh variable: sqrt(pi / (4 - pi)) = 1.913.
    assert envelope.mean() / envelope.std() == pytest.approx(1.913, rel=0.04)


def test_speckle_is_widest_far_from_the_focus(speckle):
    canvas, echo = speckle
    width = lateral_width(canvas.z[0, :, 0])
    # Neighbours of a field blurred by a Gaussian of width s correlate as exp(-d^2 / 4 s^2).
    expected = torch.exp(-((canvas.pitch / width) ** 2) / 4)
    inside = echo[..., 12:-12]
    product = (inside[..., 1:] * inside[..., :-1]).sum(1).mean((0, 2))
    correlation = product / inside.square().sum(1).mean((0, 2))
    for rows in (slice(20, 36), slice(50, 66), slice(110, 130)):
        assert correlation[rows].mean() == pytest.approx(float(expected[rows].mean()), abs=0.04)
    assert correlation[110:130].mean() > correlation[50:66].mean() + 0.08


def test_steep_needles_are_darker():
    def level(degrees: float) -> float:
        random = ClipRandom(0, [0], CPU)
        one = torch.ones(1, 30)
        needles = Needles(
            present=torch.tensor([True]),
            short=torch.tensor([False]),
            from_right=torch.tensor([False]),
            angle=one * math.radians(degrees),
            entry_depth=one * 0.2,
            length=one * 0.5,
        )
        look = sample_look(random, torch.linspace(0, 1, 30), needles, NeedleSettings())
        return float(look.level.mean())

    assert level(10) > level(30) > level(50) + 6


def test_random_numbers_of_near_seeds_are_unrelated():
    draws = torch.stack([ClipRandom(s, [0, 1], CPU).uniform(0, 1, 256) for s in range(4)])
    correlation = torch.corrcoef(draws.flatten(0, 1)) - torch.eye(8)
    assert correlation.abs().max() < 0.25  # four standard errors of 256 draws
