"""Writing simulated clips as a data folder in COCO format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from attn_kd._atomic import replacing_folder
from attn_kd.data.coco import annotation_file
from attn_kd.data.needle.randomness import mix_seed
from attn_kd.data.needle.settings import NeedleSettings
from attn_kd.data.needle.simulation import simulate_clips, simulate_frames
from attn_kd.data.needle.stream import CATEGORY
from attn_kd.errors import InputError

_CLIPS_AT_ONCE = 16
_CATEGORY_ID = 1


def split_seed(seed: int, split: str) -> int:
    """The seed of a split's clips: different splits never share a clip."""
    return mix_seed(seed, int.from_bytes(split.encode(), "little"))


def write_coco(
    out: str | os.PathLike,
    num_clips: Mapping[str, int],
    *,
    seed: int = 0,
    settings: NeedleSettings | None = None,
    whole_clips: bool = False,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda clips: None,
) -> Path:
    """Simulate clips and write them as a data folder, all of it or nothing.

    The last frame of each clip is an image of its split, with `recording`, `frame_index` and
    `short_insertion`; a clip without a needle is a negative. With `whole_clips` the earlier frames
    are written too and listed under `unlabeled_images`, a key that COCO tools ignore.

    Args:
        out: folder to write.
        num_clips: clips of each split, e.g. `{"train": 2000, "val": 300}`.
        whole_clips: write every frame rather than the last of each clip alone.
        overwrite: replace a data folder that is there.
        progress: called with the number of clips just written.

    Returns:
        The folder.

    Raises:
        InputError: no clips are asked for, or the folder is not empty or cannot be written.
    """
    settings = settings or NeedleSettings()
    for split, count in num_clips.items():
        if count < 1:
            raise InputError(f"split {split!r} has {count} clips; expected at least 1")
    if not num_clips:
        raise InputError("no split is named; expected at least one, such as train")
    out = Path(out)
    _check_replaceable(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(out) as folder:
            (folder / "images").mkdir()
            (folder / "annotations").mkdir()
            for split, count in num_clips.items():
                writer = _SplitWriter(folder, split, seed, settings, whole_clips, device)
                writer.write(count, progress)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}") from error
    return out


def _check_replaceable(out: Path, overwrite: bool) -> None:
    """Refuse to write over anything but an empty folder or, to be replaced, a data folder."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder to write")
    content = {path.name for path in out.iterdir()}
    if content and not overwrite:
        raise InputError(f"{out} is not empty; expected a new folder, or --overwrite to replace it")
    foreign = sorted(content - {"images", "annotations"})
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which no data folder does; not replaced")


class _SplitWriter:
    """Writes one split; collects its COCO document on the way."""

    def __init__(
        self,
        folder: Path,
        split: str,
        seed: int,
        settings: NeedleSettings,
        whole_clips: bool,
        device: torch.device | str,
    ) -> None:
        self._folder = folder
        self._split = split
        self._seed = split_seed(seed, split)
        self._settings = settings
        self._whole_clips = whole_clips
        self._device = device
        self._document: dict[str, Any] = {
            "info": {
                "description": "simulated ultrasound of needle insertions",
                "seed": seed,
                "settings": asdict(settings),
            },
            "images": [],
            "annotations": [],
            "categories": [{"id": _CATEGORY_ID, "name": CATEGORY}],
        }
        if whole_clips:
            self._document["unlabeled_images"] = []

    def write(self, count: int, progress: Callable[[int], None]) -> None:
        for first in range(0, count, _CLIPS_AT_ONCE):
            number = min(_CLIPS_AT_ONCE, count - first)
            self._write_clips(first, number)
            progress(number)
        file = annotation_file(self._folder, self._split)
        file.write_text(json.dumps(self._document), encoding="utf-8")

    def _write_clips(self, first: int, number: int) -> None:
        simulate = simulate_clips if self._whole_clips else simulate_frames
        batch = simulate(
            number,
            seed=self._seed,
            first_clip=first,
            settings=self._settings,
            device=self._device,
        )
        pictures, boxes = batch.frames.cpu(), batch.boxes.cpu()
        if not self._whole_clips:
            pictures, boxes = pictures[:, None], boxes[:, None]
        for i in range(number):
            recording = f"{self._split}_{first + i:06d}"
            for picture, index in zip(pictures[i, :-1], range(pictures.shape[1] - 1), strict=True):
                entry = self._write_picture(picture, recording, index)
                self._document["unlabeled_images"].append(entry)
            last = self._write_picture(pictures[i, -1], recording, self._settings.frames - 1)
            last["id"] = first + i + 1
            last["short_insertion"] = bool(batch.is_short[i])
            self._document["images"].append(last)
            if batch.has_needle[i]:
                self._annotate(last["id"], boxes[i, -1])

    def _write_picture(self, picture: Tensor, recording: str, index: int) -> dict[str, Any]:
        name = f"{recording}_{index:02d}.png"
        image = PIL.Image.fromarray(picture.numpy())
        image.save(self._folder / "images" / name, compress_level=1)
        return {
            "file_name": name,
            "width": image.width,
            "height": image.height,
            "recording": recording,
            "frame_index": index,
        }

    def _annotate(self, image_id: int, box: Tensor) -> None:
        x0, y0, x1, y1 = (round(value, 2) for value in box.tolist())
        self._document["annotations"].append(
            {
                "id": len(self._document["annotations"]) + 1,
                "image_id": image_id,
                "category_id": _CATEGORY_ID,
                "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                "area": round((x1 - x0) * (y1 - y0), 2),
                "iscrowd": 0,
            }
        )
