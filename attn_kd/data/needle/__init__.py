"""Simulated ultrasound of needle insertions (the setting of Rubin et al., ML4H 2021).

clips = simulate_clips(8, seed=1)          # 30 frames each, with the needle's box in every one
frames = simulate_frames(64, seed=1)       # the last frame of each clip alone, 30 times cheaper
"""

from attn_kd.data.needle.folder import write_coco
from attn_kd.data.needle.settings import NeedleSettings
from attn_kd.data.needle.simulation import (
    NeedleClips,
    NeedleFrames,
    simulate_clips,
    simulate_frames,
)
from attn_kd.data.needle.stream import NeedleStream, SimulatedFrames

__all__ = [
    "NeedleClips",
    "NeedleFrames",
    "NeedleSettings",
    "NeedleStream",
    "SimulatedFrames",
    "simulate_clips",
    "simulate_frames",
    "write_coco",
]
