"""What a simulated ultrasound examination looks like: the adjustable part of the simulator."""

from __future__ import annotations

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
        short_length: range of the visible needle length at the end of a short insertion.
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
        if self.size < 16:
            raise InputError(f"size is {self.size}; expected at least 16 pixels")
        if self.frames < 1:
            raise InputError(f"frames is {self.frames}; expected at least 1")
        for name in ("needle_fraction", "short_fraction"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise InputError(f"{name} is {share}; expected a share between 0 and 1")
        if not 0.0 <= self.distractors <= MAX_DISTRACTORS:
            raise InputError(
                f"distractors is {self.distractors}; expected 0 to {MAX_DISTRACTORS} per clip"
            )


MAX_DISTRACTORS = 4
