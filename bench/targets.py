"""The speed and memory attn_kd aims at, as ratios of medians in one run: smaller is better."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """The largest ratio that meets the first bar, and the one aimed at in the end."""

    first: float
    goal: float


# (dtype, pass, shape) -> attn_kd / sdpa: the divergence included, against attention without it.
AGAINST_SDPA = {
    ("float32", "forward+backward", "coco"): Target(1.10, 0.85),
    ("float32", "forward+backward", "dc5"): Target(1.10, 0.85),
    ("float32", "forward+backward", "paper"): Target(1.20, 0.90),
    ("float32", "forward+backward", "cross"): Target(1.20, 0.90),
    ("float32", "forward", "coco"): Target(1.20, 1.05),
    ("float32", "forward", "dc5"): Target(1.20, 1.05),
    ("bfloat16", "forward+backward", "coco"): Target(0.90, 0.55),
    ("bfloat16", "forward+backward", "dc5"): Target(0.90, 0.55),
}
# The same measurements, attn_kd / eager.
AGAINST_EAGER = {
    (dtype, pass_name, shape): Target(0.20, 0.12)
    for dtype, pass_name, shape in AGAINST_SDPA
    if shape in ("coco", "dc5")
}
# Peak memory of attn_kd beyond that of sdpa, as a part of one stored float32 map.
EXTRA_MEMORY = 0.02
