"""Cross-sections that the simulator draws with: cheap, and exactly zero away from the feature.

Exponentials would underflow to subnormal numbers over most of an image, which CPUs process a
hundred times more slowly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ridge(distance: Tensor) -> Tensor:
    """Bump close to a Gaussian of unit standard deviation: (1 - d^2 / 8)^4, zero beyond 2.8."""
    return distance.square().mul_(-0.125).add_(1.0).clamp_(min=0.0).square_().square_()


def ramp(distance: Tensor, width: Tensor | float) -> Tensor:
    """0 before the edge at distance 0, 1 behind it, linear over `width`."""
    return (distance / width).add_(0.5).clamp_(0.0, 1.0)


def decibels(level: Tensor) -> Tensor:
    """Amplitude of a level in decibels."""
    return torch.exp(level * (math.log(10.0) / 20.0))
