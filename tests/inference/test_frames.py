"""Which files are read, and which frames come out of them."""

from __future__ import annotations

import sys

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("transformers")

from attn_kd import InputError
from attn_kd.inference.frames import find_sources, iter_frames


def grey(level: int) -> PIL.Image.Image:
    return PIL.Image.new("L", (8, 6), level)


def test_folder_stands_for_its_pictures_in_order_of_name(tmp_path):
    for name in ("b.png", "a.jpg", "c.PNG"):
        grey(0).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [file.name for file in find_sources([tmp_path])] == ["a.jpg", "b.png", "c.PNG"]


@pytest.mark.parametrize("name", ["missing.png", "notes.txt", "empty"])
def test_what_cannot_be_read_is_named(name, tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        find_sources([tmp_path / name])


def test_still_image_is_one_frame_without_index(tmp_path):
    grey(7).save(tmp_path / "a.png")
    (frame,) = iter_frames([tmp_path / "a.png"])
    assert frame.index is None
    assert frame.image.mode == "RGB"
    assert frame.image.getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff", "webp"])
def test_animation_yields_its_frames_in_order(suffix, tmp_path):
    first, *others = [grey(level) for level in (0, 100, 200)]
    options = {"lossless": True} if suffix == "webp" else {}
    file = tmp_path / f"a.{suffix}"
    first.save(file, save_all=True, append_images=others, **options)
    frames = list(iter_frames([file]))
    assert [frame.index for frame in frames] == [0, 1, 2]
    levels = [frame.image.getpixel((0, 0))[0] for frame in frames]
    assert levels == pytest.approx([0, 100, 200], abs=2)  # a GIF has a palette


def test_sixteen_bit_image_keeps_its_contrast(tmp_path):
    levels = np.array([[0, 20000], [40000, 60000]], dtype=np.uint16)
    PIL.Image.fromarray(levels).save(tmp_path / "a.png")
    (frame,) = iter_frames([tmp_path / "a.png"])
    assert np.asarray(frame.image)[..., 0].tolist() == [[0, 85], [170, 255]]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n broken"])
def test_broken_image_is_named(content, tmp_path):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png"):
        list(iter_frames([tmp_path / "broken.png"]))


def test_truncated_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.png"):
        list(iter_frames([tmp_path / "cut.png"]))


def test_video_without_its_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    (tmp_path / "a.mp4").touch()
    with pytest.raises(InputError, match=r"attn_kd\[video\]"):
        list(iter_frames([tmp_path / "a.mp4"]))


def test_video_yields_its_frames_in_order(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in (20, 120, 220):
            frame = av.VideoFrame.from_image(PIL.Image.new("RGB", (64, 48), (level,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = list(iter_frames([tmp_path / "a.mp4"]))
    assert [frame.index for frame in frames] == [0, 1, 2]
    levels = [frame.image.getpixel((30, 30))[0] for frame in frames]
    assert levels == pytest.approx([20, 120, 220], abs=8)  # lossy


def test_broken_video_is_named(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"broken\.mp4"):
        list(iter_frames([tmp_path / "broken.mp4"]))
