"""Simulated frames as torch data sets: a stream for training, a fixed set for validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from attn_kd.data.coco import ImageAnnotations
from attn_kd.data.needle.settings import NeedleSettings
from attn_kd.data.needle.simulation import NeedleFrames, simulate_frames
from attn_kd.errors import InputError

CATEGORY = "needle"


class NeedleStream(IterableDataset):
    """Frames that are simulated while they are asked for, each the last of its own clip.

    Items are those of `CocoDetection`; `image_id` is the number of the clip. The workers of a
    DataLoader share the clips among themselves, so none is seen twice.

    Args:
        seed: of the clips.
        num_frames: length of the stream; endless if None.
        first_clip: where it starts; a stream that follows another begins where that one ended.
        settings: of the simulator.
        chunk: frames simulated at once.
        device: where they are simulated; items are on the CPU. On a GPU simulate in the main
            process (no workers), with a larger chunk.
    """

    def __init__(
        self,
        seed: int = 0,
        num_frames: int | None = None,
        *,
        first_clip: int = 0,
        settings: NeedleSettings | None = None,
        chunk: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_frames is not None and num_frames < 1:
            raise InputError(f"num_frames is {num_frames}; expected at least 1 or None")
        if chunk < 1:
            raise InputError(f"chunk is {chunk}; expected at least 1")
        self._seed = seed
        self._first = first_clip
        self._stop = None if num_frames is None else first_clip + num_frames
        self._settings = settings or NeedleSettings()
        self._chunk = chunk
        self._device = device

    @property
    def categories(self) -> list[str]:
        """Names of the classes, by label."""
        return [CATEGORY]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self._first + number * self._chunk
        while self._stop is None or start < self._stop:
            stop = start + self._chunk
            if self._stop is not None:
                stop = min(stop, self._stop)
            chunk = simulate_frames(
                stop - start,
                seed=self._seed,
                first_clip=start,
                settings=self._settings,
                device=self._device,
            ).cpu()
            for i in range(stop - start):
                yield _item(chunk, i, start + i)
            start += count * self._chunk


class SimulatedFrames(Dataset):
    """A fixed number of simulated frames, held in memory (16 kB each at 128 x 128).

    Items and accessors are those of `CocoDetection`.
    """

    def __init__(
        self, num_frames: int, *, seed: int = 0, settings: NeedleSettings | None = None
    ) -> None:
        self._frames = simulate_frames(num_frames, seed=seed, settings=settings or NeedleSettings())

    @property
    def categories(self) -> list[str]:
        """Names of the classes, by label."""
        return [CATEGORY]

    def __len__(self) -> int:
        return len(self._frames.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in {len(self)} frames")
        return _item(self._frames, index, index)

    def annotations(self, index: int) -> ImageAnnotations:
        """The needle of a frame, if it has one."""
        target = _target(self._frames, index)
        return ImageAnnotations(
            target["boxes"],
            target["class_labels"],
            torch.zeros(len(target["class_labels"]), dtype=torch.bool),
        )


def _item(frames: NeedleFrames, index: int, clip: int) -> dict[str, Any]:
    image = frames.frames[index]
    return {
        "image": image.expand(3, *image.shape),
        "target": _target(frames, index),
        "image_id": clip,
        "short_insertion": bool(frames.is_short[index]),
    }


def _target(frames: NeedleFrames, index: int) -> dict[str, torch.Tensor]:
    boxes = frames.boxes[index : index + 1][frames.has_needle[index : index + 1]]
    return {"boxes": boxes, "class_labels": torch.zeros(len(boxes), dtype=torch.int64)}
