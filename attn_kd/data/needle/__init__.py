"""Simulated ultrasound of needle insertions (the setting of Rubin et al., ML4H 2021).

clips = simulate_clips(8, seed=1)          # 30 frames each, with the needle's box in every one
frames = simulate_frames(64, seed=1)       # the last frame of each clip alone, 30 times cheaper
"""

from .settings import NeedleSettings
from .simulation import NeedleClips, NeedleFrames, simulate_clips, simulate_frames

__all__ = ["NeedleClips", "NeedleFrames", "NeedleSettings", "simulate_clips", "simulate_frames"]
