"""Single frames out of what a user may name: images, folders of images, animations and videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import PIL.ImageSequence

from attn_kd.data.images import DAMAGE, to_rgb
from attn_kd.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


@dataclass(frozen=True)
class Frame:
    """One picture and where it comes from."""

    source: Path
    index: int | None  # position in an animation or video, from 0; None for a still image
    image: PIL.Image.Image


def find_sources(paths: Iterable[Path]) -> list[Path]:
    """The files to read: a folder stands for the images and videos in it, in order of name.

    Raises:
        InputError: a path does not exist, is of an unknown kind, or a folder holds nothing to read.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if _is_readable(file))
            if not inside:
                raise InputError(f"{path} holds no image or video; expected {_known_kinds()}")
            files += inside
        elif not path.exists():
            raise InputError(f"{path} does not exist; expected an image, a folder or a video")
        elif not _is_readable(path):
            raise InputError(f"{path} is neither image nor video; expected {_known_kinds()}")
        else:
            files.append(path)
    return files


def iter_frames(files: Iterable[Path]) -> Iterator[Frame]:
    """Decode ``files`` one frame at a time.

    Animated GIF, PNG and WebP and multi-page TIFF yield all their frames; videos are decoded by
    PyAV, an optional package.

    Raises:
        InputError: a file is broken, or PyAV is needed and not installed.
    """
    for file in files:
        if file.suffix.lower() in VIDEO_SUFFIXES:
            yield from _video_frames(file)
        else:
            yield from _image_frames(file)


def _image_frames(file: Path) -> Iterator[Frame]:
    try:
        with PIL.Image.open(file) as opened:
            animated = getattr(opened, "n_frames", 1) > 1
            for index, image in enumerate(PIL.ImageSequence.Iterator(opened)):
                yield Frame(file, index if animated else None, to_rgb(image))
    except DAMAGE as error:
        raise InputError(f"{file} cannot be read as an image: {error}") from error


def _video_frames(file: Path) -> Iterator[Frame]:
    try:
        import av
    except ModuleNotFoundError:
        raise InputError(
            f"reading {file} needs the package 'av'; install it with: pip install 'attn_kd[video]'"
        ) from None
    try:
        with av.open(str(file)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                yield Frame(file, index, frame.to_image())
    except (av.FFmpegError, IndexError) as error:  # IndexError: there is no video stream
        raise InputError(f"{file} cannot be read as a video: {error}") from error


def _is_readable(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _known_kinds() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
