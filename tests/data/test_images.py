"""Decoding pictures of every mode that data sets come in."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from attn_kd.data import read_image
from attn_kd.data.images import to_tensor
from attn_kd.errors import InputError


def picture(mode: str) -> PIL.Image.Image:
    """A grey ramp in a mode, 6 x 4."""
    ramp = np.linspace(0, 255, 24).reshape(4, 6)
    if mode == "I;16":
        return PIL.Image.fromarray((ramp * 257).astype(np.uint16))
    if mode in ("I", "F"):
        return PIL.Image.fromarray((ramp * 16).astype(np.int32 if mode == "I" else np.float32))
    return PIL.Image.fromarray(ramp.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "I", "F", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels_of_bytes(mode):
    pixels = to_tensor(picture(mode))
    assert pixels.shape == (3, 4, 6)
    assert pixels.dtype == torch.uint8
    assert pixels.min() == 0
    assert pixels.max() >= 254


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grey_levels_are_scaled_rather_than_cut_off(mode):
    expected = to_tensor(picture("L")).int()
    assert (to_tensor(picture(mode)).int() - expected).abs().max() <= 1


def test_grey_levels_below_256_keep_their_value():
    image = PIL.Image.fromarray(np.array([[0, 7, 200]], dtype=np.uint16))
    assert to_tensor(image)[0].tolist() == [[0, 7, 200]]


def test_colours_stay_in_order(tmp_path):
    PIL.Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "c.png")
    assert read_image(tmp_path / "c.png")[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"half\.{suffix} cannot be read"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"no picture at all"], ids=["empty", "text"])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.png cannot be read"):
        read_image(path)
