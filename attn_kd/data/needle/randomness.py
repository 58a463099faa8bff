"""Random numbers that belong to a clip, whatever batch the clip is simulated in."""

from __future__ import annotations

import torch
from torch import Tensor

_UNIFORMS_PER_CLIP = 512
_MASK = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """Hash integers to a 63-bit seed (splitmix64 finaliser), so that near seeds are unrelated."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class ClipRandom:
    """Random draws for N clips, each from generators seeded by (seed, clip number) alone.

    Clip i of a seed is therefore the same clip in a batch of one, a batch of a hundred, a training
    stream or a written data set. Parameters are drawn on the CPU, so boxes and labels do not depend
    on the device; noise fields are drawn on the device.
    """

    def __init__(self, seed: int, clips: list[int], device: torch.device) -> None:
        self.num_clips = len(clips)
        self.device = device
        self._next = 0
        table = torch.empty(self.num_clips, _UNIFORMS_PER_CLIP)
        self._fields = []
        for row, clip in zip(table, clips, strict=True):
            clip_seed = mix_seed(seed, clip)
            row.uniform_(generator=torch.Generator().manual_seed(clip_seed))
            self._fields.append(torch.Generator(device).manual_seed(mix_seed(clip_seed)))
        self._table = table.to(device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform draws in [low, high), [N, *shape] float32."""
        count = torch.Size(shape).numel()
        start, self._next = self._next, self._next + count
        if self._next > _UNIFORMS_PER_CLIP:
            raise RuntimeError(f"a clip draws more than {_UNIFORMS_PER_CLIP} parameters")
        draws = self._table[:, start : self._next].reshape(self.num_clips, *shape)
        return low + (high - low) * draws

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Events of the given probability, [N, *shape] bool."""
        return self.uniform(0.0, 1.0, *shape) < probability

    def sign(self, *shape: int) -> Tensor:
        """-1 or +1 with even odds, [N, *shape] float32."""
        return 1.0 - 2.0 * self.chance(0.5, *shape).float()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise fields, [N, *shape] float32."""
        fields = torch.empty(self.num_clips, *shape, device=self.device)
        for field, generator in zip(fields, self._fields, strict=True):
            field.normal_(generator=generator)
        return fields
