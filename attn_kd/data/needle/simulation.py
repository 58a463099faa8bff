"""Simulated ultrasound of needle insertions: whole clips, or the last frame of each alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.data.needle.acquisition import (
    Scanner,
    add_noise,
    add_rough_mirror,
    compress,
    image_tissue,
    noise_places,
    sample_scanner,
)
from attn_kd.data.needle.anatomy import Canvas, sample_tissue
from attn_kd.data.needle.echo import NeedleLook, needle_echo, sample_look
from attn_kd.data.needle.motion import TissueMotion, sample_motion, sampling_grid
from attn_kd.data.needle.randomness import ClipRandom
from attn_kd.data.needle.settings import NeedleSettings
from attn_kd.data.needle.trajectory import Needles, sample_needles
from attn_kd.errors import InputError

# What is rendered at once: few enough that intermediate results stay in the processor's cache, many
# enough that the cost of calling operators does not count.
_CLIPS_AT_ONCE = 1
_FRAMES_AT_ONCE = 16


@dataclass(frozen=True)
class NeedleClips:
    """N simulated clips of T frames.

    frames: uint8 [N, T, S, S], frame 0 first; boxes: float32 [N, T, 4], xyxy in pixels, NaN where
    no needle is visible; has_needle, is_short: bool [N], about the last frame.
    """

    frames: Tensor
    boxes: Tensor
    has_needle: Tensor
    is_short: Tensor


@dataclass(frozen=True)
class NeedleFrames:
    """The last frames of N simulated clips: frames uint8 [N, S, S], boxes float32 [N, 4]."""

    frames: Tensor
    boxes: Tensor
    has_needle: Tensor
    is_short: Tensor

    def cpu(self) -> NeedleFrames:
        """The same in the memory of the CPU."""
        tensors = (self.frames, self.boxes, self.has_needle, self.is_short)
        return NeedleFrames(*(tensor.cpu() for tensor in tensors))


@dataclass(frozen=True)
class _Scene:
    """All that is fixed about a batch of clips before a frame is rendered."""

    echo: Tensor  # [N, 2, Hc, Wc]
    motion: TissueMotion
    needles: Needles
    look: NeedleLook
    scanner: Scanner
    noise: list[list[list[int]]]  # places on the noise tile, [N][T][2]
    settings: NeedleSettings


def simulate_clips(
    num_clips: int,
    *,
    size: int = 128,
    frames: int = 30,
    seed: int = 0,
    first_clip: int = 0,
    device: torch.device | str = "cpu",
    settings: NeedleSettings | None = None,
) -> NeedleClips:
    """Simulate clips `first_clip` … `first_clip + num_clips - 1` of `seed`, whole.

    Clip i of a seed is the same in every batch; `settings` overrides `size` and `frames`.

    Raises:
        InputError: `num_clips` is below 1, or a setting makes no sense.
    """
    settings = settings or NeedleSettings(size=size, frames=frames)
    parts = []
    for clips in _batches(num_clips, first_clip, _CLIPS_AT_ONCE):
        scene = _build_scene(clips, seed, settings, device)
        parts.append(
            NeedleClips(
                _render(scene, slice(None)),
                scene.needles.boxes(settings.size, settings.minimum_thickness),
                scene.needles.present,
                scene.needles.short,
            )
        )
    return _concatenate(parts)


def simulate_frames(
    num_frames: int,
    *,
    size: int = 128,
    frames: int = 30,
    seed: int = 0,
    first_clip: int = 0,
    device: torch.device | str = "cpu",
    settings: NeedleSettings | None = None,
) -> NeedleFrames:
    """Simulate the last frame alone of the clips that `simulate_clips` would make.

    Rendering one frame instead of 30 is what lets a training run draw fresh frames all the time.
    """
    settings = settings or NeedleSettings(size=size, frames=frames)
    parts = []
    for clips in _batches(num_frames, first_clip, _FRAMES_AT_ONCE):
        scene = _build_scene(clips, seed, settings, device)
        last = _render(scene, slice(settings.frames - 1, settings.frames))
        boxes = scene.needles.boxes(settings.size, settings.minimum_thickness)
        parts.append(
            NeedleFrames(last[:, 0], boxes[:, -1], scene.needles.present, scene.needles.short)
        )
    return _concatenate(parts)


def _batches(count: int, first: int, at_once: int) -> Iterator[list[int]]:
    if count < 1:
        raise InputError(f"the number of clips is {count}; expected at least 1")
    for start in range(first, first + count, at_once):
        yield list(range(start, min(start + at_once, first + count)))


_Part = TypeVar("_Part", NeedleClips, NeedleFrames)


def _concatenate(parts: list[_Part]) -> _Part:
    kind = type(parts[0])
    return kind(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(kind)))


def _build_scene(
    clips: list[int], seed: int, settings: NeedleSettings, device: torch.device | str
) -> _Scene:
    random = ClipRandom(seed, clips, torch.device(device))
    times = torch.linspace(0.0, 1.0, settings.frames, device=device)
    canvas = Canvas.around_view(settings.size, random.device)
    scanner = sample_scanner(random, settings.size)
    tissue = sample_tissue(random, canvas, settings)
    motion = sample_motion(random, times, tissue.vessels)
    needles = sample_needles(random, times, motion.depth_shift, settings)
    look = sample_look(random, times, needles, settings)
    echo = image_tissue(random, tissue, canvas)
    noise = noise_places(random, settings.frames, settings.size)
    return _Scene(echo, motion, needles, look, scanner, noise, settings)


def _render(scene: _Scene, frames: slice) -> Tensor:
    """Render some frames of each clip, uint8 [N, T, S, S]."""
    size = scene.settings.size
    grid = sampling_grid(scene.motion, frames, size)  # [N, T, S, S, 2]
    num_clips, num_frames = grid.shape[:2]
    echo = F.grid_sample(
        scene.echo, grid.flatten(1, 2), padding_mode="reflection", align_corners=False
    )
    echo = echo.view(num_clips, 2, num_frames, size, size).transpose(1, 2).contiguous()
    shown = scene.needles.present.nonzero()[:, 0]
    if shown.numel():
        amplitude, transmission = needle_echo(
            _select(scene.needles, shown), _select(scene.look, shown), frames, size
        )
        for clip, seen, added in zip(shown.tolist(), transmission, amplitude, strict=True):
            echo[clip] *= seen[:, None]
            add_rough_mirror(echo[clip], added, scene.noise[clip][0])
    echo *= scene.scanner.gain[:, None, None]
    add_noise(echo, [places[frames] for places in scene.noise], scene.scanner)
    return compress(echo, scene.scanner)


_Batched = TypeVar("_Batched", Needles, NeedleLook)


def _select(batch: _Batched, clips: Tensor) -> _Batched:
    return type(batch)(*(getattr(batch, f.name)[clips] for f in fields(batch)))
