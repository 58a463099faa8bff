"""Reading pictures of any mode as RGB."""

from __future__ import annotations

import os

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from attn_kd.errors import InputError

# How Pillow reports a damaged file; SyntaxError is its complaint about broken PNG chunks.
DAMAGE = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)


def read_image(path: str | os.PathLike) -> Tensor:
    """Decode an image file to uint8 [3, H, W].

    EXIF orientation is ignored: COCO's boxes refer to the pixels as they are stored.

    Raises:
        InputError: the file is missing, truncated or not an image.
    """
    try:
        with PIL.Image.open(path) as image:
            return to_tensor(image)
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def to_tensor(image: PIL.Image.Image) -> Tensor:
    """A picture as uint8 [3, H, W]; the channels of a grey one share their memory."""
    if image.mode != "L":
        image = to_rgb(image)
    pixels = torch.from_numpy(np.array(image))
    if pixels.ndim == 2:
        return pixels.expand(3, *pixels.shape)
    return pixels.permute(2, 0, 1).contiguous()


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture in RGB; 16-bit, 32-bit and float grey levels are scaled by their own maximum.

    Pillow's own conversion of those modes cuts off at 255, which leaves 12- and 16-bit medical
    images white.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        levels = np.nan_to_num(np.asarray(image, dtype=np.float32))
        highest = float(levels.max(initial=0.0))
        if highest > 255:
            levels = levels * (255 / highest)
        image = PIL.Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")
