"""What the simulator promises about its clips."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_kd.data.needle import NeedleSettings, simulate_clips, simulate_frames
from attn_kd.errors import InputError

SMALL = NeedleSettings(size=32, frames=6)


def with_and_without_needle(count: int):
    """The same clips twice: all with a needle, none with one."""
    settings = NeedleSettings(size=64, needle_fraction=1.0)
    bare = dataclasses.replace(settings, needle_fraction=0.0)
    return simulate_frames(count, settings=settings), simulate_frames(count, settings=bare)


def test_shapes_and_types():
    clips = simulate_clips(3, size=32, frames=5)
    assert clips.frames.shape == (3, 5, 32, 32)
    assert clips.frames.dtype == torch.uint8
    assert clips.boxes.shape == (3, 5, 4)
    assert clips.boxes.dtype == torch.float32
    assert clips.has_needle.dtype == clips.is_short.dtype == torch.bool


@given(first=st.integers(0, 1000), before=st.integers(0, 20), after=st.integers(0, 3))
def test_a_clip_does_not_depend_on_its_batch(first, before, after):
    alone = simulate_frames(1, seed=4, first_clip=first + before, settings=SMALL)
    batch = simulate_frames(before + 1 + after, seed=4, first_clip=first, settings=SMALL)
    difference = batch.frames[before].int() - alone.frames[0].int()
    assert difference.abs().max() <= 1  # vectorised loops round their remainders differently
    torch.testing.assert_close(batch.boxes[before], alone.boxes[0], equal_nan=True)


def test_a_single_frame_is_the_last_of_its_clip():
    clips = simulate_clips(8, seed=2, settings=SMALL)
    frames = simulate_frames(8, seed=2, settings=SMALL)
    assert (clips.frames[:, -1].int() - frames.frames.int()).abs().max() <= 1
    torch.testing.assert_close(clips.boxes[:, -1], frames.boxes, equal_nan=True)
    assert torch.equal(clips.is_short, frames.is_short)


def test_seeds_decide():
    first, again, other = (simulate_frames(4, seed=s, settings=SMALL).frames for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shares_of_needles_and_short_insertions():
    frames = simulate_frames(600, settings=SMALL)
    # Four standard errors of a share of 0.6 among 600: 4 * sqrt(0.24 / 600) = 0.08.
    assert frames.has_needle.float().mean() == pytest.approx(0.6, abs=0.08)
    assert frames.is_short[frames.has_needle].float().mean() == pytest.approx(0.25, abs=0.09)
    assert not frames.is_short[~frames.has_needle].any()


def test_boxes_mark_needles_and_lie_in_the_frame():
    frames = simulate_frames(300, size=32)
    assert torch.equal(frames.boxes.isnan().any(1), ~frames.has_needle)
    boxes = frames.boxes[frames.has_needle]
    assert ((boxes >= 0) & (boxes <= 32)).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    minimum = NeedleSettings().minimum_thickness * 32
    assert (sides >= 0.99 * minimum).all()
    assert ((boxes[:, 0] == 0) | (boxes[:, 2] == 32)).all(), "needles enter from a side"


def test_every_short_insertion_is_shorter_than_every_long_one():
    # Without a smallest thickness, a box's diagonal is the visible length of its needle.
    settings = NeedleSettings(size=32, needle_fraction=1.0, minimum_thickness=1e-6)
    frames = simulate_frames(300, settings=settings)
    length = (frames.boxes[:, 2:] - frames.boxes[:, :2]).norm(dim=1) / 32
    assert 0.115 < length[frames.is_short].min() < length[frames.is_short].max() < 0.245
    assert length[~frames.is_short].min() > 0.295


def test_the_box_surrounds_what_the_needle_changes():
    shown, bare = with_and_without_needle(24)
    change = (shown.frames.int() - bare.frames.int()).abs()
    for difference, box in zip(change, shown.boxes.tolist(), strict=True):
        x0, y0, x1, y1 = box
        columns = torch.arange(64) + 0.5
        beside = (columns < x0 - 4) | (columns > x1 + 4)
        above = torch.arange(64) + 0.5 < y0 - 4
        assert difference[:, beside].max() <= 1 if beside.any() else True
        assert difference[above].max() <= 1 if above.any() else True
        assert difference[round(y0) : round(y1), round(x0) : round(x1)].float().mean() > 1


def test_a_shadow_lies_below_the_needle():
    shown, bare = with_and_without_needle(64)
    darker = []
    for with_needle, without, box in zip(shown.frames, bare.frames, shown.boxes, strict=True):
        x0, _, x1, y1 = box.round().int().tolist()
        if y1 <= 52:
            below = slice(y1 + 4, 64), slice(x0, x1)
            darker.append((without[below].float() - with_needle[below].float()).mean())
    assert len(darker) > 10
    assert torch.stack(darker).mean() > 2


def test_frames_use_the_range_of_greys():
    frames = simulate_frames(64).frames.float()
    assert 20 < frames.mean() < 130
    assert (frames.mean((1, 2)) > 5).all()
    assert (frames.flatten(1).std(1) > 10).all()


def test_one_frame_per_clip_is_allowed():
    assert simulate_clips(2, size=32, frames=1).frames.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("size", [16, 33, 200])
def test_any_size_is_rendered(size):
    assert simulate_frames(2, size=size).frames.shape == (2, size, size)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"size": 8}, "size"),
        ({"frames": 0}, "frames"),
        ({"needle_fraction": 1.2}, "needle_fraction"),
        ({"short_fraction": -0.1}, "short_fraction"),
        ({"distractors": 9}, "distractors"),
        ({"size": float("nan")}, "size"),
        ({"size": 64.5}, "size"),
        ({"short_length": (0.2, 0.1)}, "short_length"),
        ({"short_length": (0.2, 0.9)}, "short_length"),
        ({"short_length": (0.0, 0.1)}, "short_length"),
        ({"needle_level": (float("nan"), 6.0)}, "needle_level"),
        ({"needle_level": (6.0, -3.0)}, "needle_level"),
        ({"minimum_thickness": -1.0}, "minimum_thickness"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_make_no_sense_are_named(options, name):
    with pytest.raises(InputError, match=name):
        NeedleSettings(**options)


def test_no_clips_is_refused():
    with pytest.raises(InputError, match="number of clips is 0"):
        simulate_frames(0)


@pytest.mark.gpu
def test_labels_do_not_depend_on_the_device():
    here = simulate_frames(32, settings=SMALL)
    there = simulate_frames(32, settings=SMALL, device="cuda")
    assert torch.equal(here.has_needle, there.has_needle.cpu())
    torch.testing.assert_close(here.boxes, there.boxes.cpu(), equal_nan=True, atol=1e-3, rtol=0)
