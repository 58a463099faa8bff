"""What a simulated ultrasound examination looks like: the adjustable part of the simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_kd.errors import InputError


@dataclass(frozen=True)
class NeedleSettings:
    """Settings of the needle simulator.

    Lengths are fractions of the field of view (about 4 cm x 4 cm, square), which spans [0, 1] in
    the lateral direction x and in depth z. Levels are in decibels relative to the brightest fascia.

    Attributes:
        size: height and width of a frame in pixels.
        frames: frames of a clip; a clip lasts one second whatever their number.
        needle_fraction: share of clips with a needle (Rubin et al. 2021: 60 %).
        short_fraction: share of the clips with a needle that end as a short insertion.
        short_length: range of the visible needle length at the end of a short insertion; a long
            one ends with at least 0.30.
        distractors: how many needle-like septa a clip shows on average.
        needle_level: range of a needle's level when it is perpendicular to the beam.
        minimum_thickness: smallest side of a box; a horizontal needle would otherwise have none.
    """

    size: int = 128
    frames: int = 30
    needle_fraction: float = 0.6
    short_fraction: float = 0.25
    short_length: tuple[float, float] = (0.12, 0.24)
    distractors: float = 0.8
    needle_level: tuple[float, float] = (-3.0, 6.0)
    minimum_thickness: float = 0.07

    def __post_init__(self) -> None:
        for name, least in (("size", 16), ("frames", 1)):
            count = getattr(self, name)
            if not isinstance(count, int) or count < least:
                raise InputError(f"{name} is {count}; expected a whole number of at least {least}")
        for name in ("needle_fraction", "short_fraction"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise InputError(f"{name} is {share}; expected a share between 0 and 1")
        if not 0.0 <= self.distractors <= MAX_DISTRACTORS:
            raise InputError(
                f"distractors is {self.distractors}; expected 0 to {MAX_DISTRACTORS} per clip"
            )
        low, high = self.short_length
        if not 0.0 < low <= high <= SHORTEST_LONG:
            raise InputError(
                f"short_length is {self.short_length}; "
                f"expected a range within 0 to {SHORTEST_LONG}, where long insertions begin"
            )
        low, high = self.needle_level
        if not -math.inf < low <= high < math.inf:
            raise InputError(
                f"needle_level is {self.needle_level}; expected a finite range of decibels"
            )
        if not 0.0 < self.minimum_thickness < 1.0:
            raise InputError(
                f"minimum_thickness is {self.minimum_thickness}; expected more than 0, less than 1"
            )


MAX_DISTRACTORS = 4
SHORTEST_LONG = 0.30  # visible length at the end of an insertion that is not short
