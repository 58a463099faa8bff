"""Random changes to an image that a detector must not mind; the boxes follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """Flip, scale, crop, gamma and gain.

    Scale and crop are one window on the image: smaller than the image it enlarges what is inside
    and crops the rest, larger it shrinks the image on a black ground. The collator then resizes
    the window to the size of the model's input.

    Attributes:
        flip: probability of a left-right flip.
        scale: range of magnification (log-uniform), applied with probability `scale_probability`.
        scale_probability: of scaling and cropping at all.
        stretch: largest change of the aspect ratio, as a factor (1: none).
        gamma: range of the exponent of the grey levels (log-uniform; 1 for none).
        gain: range of the factor on the grey levels (log-uniform; 1 for none).
        keep: smallest share of a box's area that must remain in the window; other boxes go.
    """

    flip: float = 0.5
    scale: tuple[float, float] = (0.8, 1.4)
    scale_probability: float = 0.8
    stretch: float = 1.15
    gamma: tuple[float, float] = (0.7, 1.4)
    gain: tuple[float, float] = (0.8, 1.25)
    keep: float = 0.4

    def __post_init__(self) -> None:
        for name in ("flip", "scale_probability", "keep"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        for name in ("scale", "gamma", "gain"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise InputError(f"{name} is {(low, high)}; expected a positive, ordered range")
        if self.stretch < 1.0:
            raise InputError(f"stretch is {self.stretch}; expected at least 1")

    def __call__(
        self,
        image: Tensor,
        boxes: Tensor,
        class_labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Augment one image.

        Args:
            image: uint8 [C, H, W].
            boxes: float32 [n, 4], xyxy in pixels.
            class_labels: int64 [n].
            generator: source of randomness; torch's own if None, which DataLoader seeds for each
                worker and epoch.

        Returns:
            Image uint8 [C, H', W'] with its boxes [m, 4] and class labels [m], m <= n.
        """
        draws = torch.rand(8, generator=generator).tolist()
        image = _adjust_levels(image, _between(self.gamma, draws[0]), _between(self.gain, draws[1]))
        if draws[2] < self.flip:
            image, boxes = image.flip(-1), _flip(boxes, image.shape[-1])
        if draws[3] < self.scale_probability:
            window = self._window(image.shape[-2], image.shape[-1], draws[4:])
            image = _cut(image, window)
            boxes, kept = _boxes_in(window, boxes, self.keep)
            class_labels = class_labels[kept]
        return image, boxes, class_labels

    def _window(self, height: int, width: int, draws: list[float]) -> tuple[int, int, int, int]:
        """Left, top, width and height of the window; it lies inside the image or around it."""
        scale = _between(self.scale, draws[0])
        aspect = _between((1 / self.stretch, self.stretch), draws[1]) ** 0.5
        window_width = max(1, round(width / scale * aspect))
        window_height = max(1, round(height / scale / aspect))
        left = round(draws[2] * (width - window_width))
        top = round(draws[3] * (height - window_height))
        return left, top, window_width, window_height


def _between(bounds: tuple[float, float], draw: float) -> float:
    """The log-uniform value of a uniform draw in [0, 1)."""
    low, high = bounds
    return low * (high / low) ** draw


def _adjust_levels(image: Tensor, gamma: float, gain: float) -> Tensor:
    """gain * level ** gamma, by a table of the 256 levels."""
    if gamma == 1.0 and gain == 1.0:
        return image
    levels = torch.linspace(0.0, 1.0, 256).pow(gamma).mul(255.0 * gain)
    table = levels.round().clamp(0.0, 255.0).to(torch.uint8).numpy()
    return torch.from_numpy(np.take(table, image.numpy()))


def _flip(boxes: Tensor, width: int) -> Tensor:
    flipped = boxes.clone()
    flipped[:, 0], flipped[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return flipped


def _cut(image: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """The window's pixels, black where it reaches beyond the image."""
    left, top, width, height = window
    rows, columns = image.shape[-2:]
    # A negative pad crops.
    return F.pad(image, (-left, left + width - columns, -top, top + height - rows))


def _boxes_in(
    window: tuple[int, int, int, int], boxes: Tensor, keep: float
) -> tuple[Tensor, Tensor]:
    """Boxes in the window's coordinates, clipped, and which of the boxes remain [n] bool."""
    left, top, width, height = window
    shifted = boxes - boxes.new_tensor([left, top, left, top])
    clipped = shifted.clamp(min=0.0).minimum(boxes.new_tensor([width, height, width, height]))
    sides = (clipped[:, 2:] - clipped[:, :2]).clamp(min=0.0)
    area = (shifted[:, 2:] - shifted[:, :2]).prod(1)
    kept = (sides.prod(1) >= keep * area) & (sides >= 1.0).all(1)
    return clipped[kept], kept
