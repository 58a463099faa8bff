"""The file ``predictions.json`` and the pictures beside it.

``predictions.json`` is one object::

    {"format": "attn_kd.predictions", "version": 1,
     "model": "runs/student",            the model folder, as given
     "threshold": 0.5,                   the lowest score that was kept
     "labels": {"0": "needle"},          label -> name
     "frames": [                         in the order of the inputs
       {"source": "clips/a.gif",         the file the frame comes from
        "frame": 3,                      its place in an animation or video, from 0; else null
        "width": 128, "height": 128,     pixels
        "picture": "pictures/a-00003.png",   boxes drawn in; relative to this file; may be null
        "detections": [                  best first
          {"box": [x1, y1, x2, y2],      pixels from the top left corner of the frame
           "score": 0.93, "label": 0, "name": "needle"}]}]}
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from attn_kd._atomic import replacing_file, replacing_folder
from attn_kd.errors import InputError
from attn_kd.inference.detector import Detections, Detector
from attn_kd.inference.drawing import draw_detections
from attn_kd.inference.frames import Frame

_FORMAT = "attn_kd.predictions"


def write_predictions(
    detector: Detector,
    frames: Iterable[Frame],
    out: Path,
    *,
    model_name: str,
    threshold: float = 0.5,
    batch_size: int = 8,
    pictures: bool = True,
) -> dict[str, Any]:
    """Detect in all ``frames`` and write ``out/predictions.json`` and ``out/pictures/``.

    What an earlier call has written there is replaced; nothing is, unless every frame could be
    read. Returns what stands in the JSON file.

    Raises:
        InputError: what would be replaced is not, or not only, what an earlier call has written; or
            a frame comes from the folder of the pictures.
    """
    _require_replaceable(out, pictures=pictures)
    if pictures:
        frames = _from_elsewhere(frames, out / "pictures")
    with _made_folder(out):
        with replacing_folder(out / "pictures") if pictures else nullcontext() as folder:
            records = _detect_and_draw(detector, frames, folder, threshold, batch_size)
        document = {
            "format": _FORMAT,
            "version": 1,
            "model": model_name,
            "threshold": threshold,
            "labels": {str(label): name for label, name in detector.label_names.items()},
            "frames": records,
        }
        with replacing_file(out / "predictions.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")
    return document


def _detect_and_draw(
    detector: Detector,
    frames: Iterable[Frame],
    folder: Path | None,
    threshold: float,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The records of all frames; their pictures are saved in ``folder``, if there is one."""
    records = []
    names = _PictureNames()
    for frame, detections in _detect(detector, frames, threshold, batch_size):
        record = _record(frame, detections, detector)
        if folder is not None:
            name = names.take(frame)
            draw_detections(frame.image, detections, detector.label_names).save(folder / name)
            record["picture"] = f"pictures/{name}"
        records.append(record)
    return records


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` and its parents; what was made goes again if the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: it stays
            for path in made:
                path.rmdir()
        raise


def _require_replaceable(out: Path, *, pictures: bool) -> None:
    """Raise InputError unless the output's places are free or hold earlier output alone."""
    file, folder = out / "predictions.json", out / "pictures"
    written = _pictures_named_by(file)
    if written is None:
        raise InputError(f"{file} was not written by attn_kd; not replaced, choose another folder")
    if not pictures or not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder} is no folder of its own; not replaced, choose another folder")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in written)
    if foreign:
        raise InputError(
            f"{folder} holds {foreign[0]}, which {file.name} beside it does not name; "
            "not replaced, choose another folder"
        )


def _pictures_named_by(file: Path) -> set[str] | None:
    """Names of the pictures that belong to a predictions.json; None if it is of another kind."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            return None
        return {Path(frame["picture"]).name for frame in document["frames"] if frame["picture"]}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _from_elsewhere(frames: Iterable[Frame], folder: Path) -> Iterator[Frame]:
    """``frames``, of which none may come from ``folder``, since that will be replaced."""
    folder = folder.resolve()
    for frame in frames:
        if folder in frame.source.resolve().parents:
            raise InputError(
                f"{frame.source} lies where the pictures will be written; choose another folder"
            )
        yield frame


def _detect(
    detector: Detector, frames: Iterable[Frame], threshold: float, batch_size: int
) -> Iterator[tuple[Frame, Detections]]:
    frames = iter(frames)
    while batch := list(itertools.islice(frames, batch_size)):
        images = [frame.image for frame in batch]
        yield from zip(batch, detector.predict(images, threshold=threshold), strict=True)


def _record(frame: Frame, detections: Detections, detector: Detector) -> dict[str, Any]:
    names = detector.label_names
    return {
        "source": str(frame.source),
        "frame": frame.index,
        "width": frame.image.width,
        "height": frame.image.height,
        "picture": None,
        "detections": [
            {
                "box": [round(corner, 2) for corner in box],
                "score": round(score, 4),
                "label": label,
                "name": names.get(label, str(label)),
            }
            for box, score, label in detections.rows()
        ],
    }


class _PictureNames:
    """File names that stay apart even where two sources have the same name."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, frame: Frame) -> str:
        stem = frame.source.stem
        if frame.index is not None:
            stem = f"{stem}-{frame.index:05d}"
        name, count = f"{stem}.png", 1
        while name in self._taken:
            count += 1
            name = f"{stem}-{count}.png"
        self._taken.add(name)
        return name
