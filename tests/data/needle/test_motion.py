"""Motion: tissue sways smoothly, the needle advances on its own."""

from __future__ import annotations

import dataclasses

import torch

from attn_kd.data.needle import NeedleSettings, simulate_clips
from attn_kd.data.needle.anatomy import CANVAS_MARGIN, Canvas, sample_tissue
from attn_kd.data.needle.motion import sample_motion, sampling_grid
from attn_kd.data.needle.randomness import ClipRandom

SIZE = 32
TIMES = torch.linspace(0.0, 1.0, 30)


def grids(count: int) -> torch.Tensor:
    """Sampling grids of some clips in shares of the field of view, [N, T, S, S, 2]."""
    random = ClipRandom(0, list(range(count)), torch.device("cpu"))
    canvas = Canvas.around_view(SIZE, torch.device("cpu"))
    tissue = sample_tissue(random, canvas, NeedleSettings(size=SIZE))
    motion = sample_motion(random, TIMES, tissue.vessels)
    return sampling_grid(motion, slice(None), SIZE) * canvas.x.shape[-1] / SIZE / 2


def test_tissue_moves_but_smoothly():
    steps = grids(16).diff(dim=1).norm(dim=-1)
    travel = steps.sum(1)
    assert (travel.amax((1, 2)) > 0.005).all(), "every clip moves"
    assert steps.max() < 0.012, "less than half a pixel of 32 from frame to frame"


def test_motion_never_looks_beyond_the_canvas():
    assert grids(64).abs().max() < 0.5 + CANVAS_MARGIN


def test_the_tip_travels_farther_than_the_tissue():
    settings = NeedleSettings(size=SIZE, needle_fraction=1.0)
    boxes = simulate_clips(40, settings=settings).boxes
    width = (boxes[..., 2] - boxes[..., 0]).nan_to_num(0.0)
    advance = (width[:, -1] - width.amin(1)) / SIZE
    tissue = grids(40)
    displacement = (tissue - tissue[:, -1:]).norm(dim=-1).amax(1).mean((1, 2))
    travel = tissue.diff(dim=1).norm(dim=-1).sum(1).mean((1, 2))
    assert (advance > displacement).all(), "every tip ends farther from where it began"
    assert (advance / travel).median() > 3, "even against the whole way there and back"


def test_a_frame_hides_the_needle_among_bright_lines_but_motion_shows_it():
    settings = NeedleSettings(size=64, needle_fraction=1.0)
    shown = simulate_clips(24, settings=settings)
    bare = simulate_clips(24, settings=dataclasses.replace(settings, needle_fraction=0.0))
    outshone, gain = [], []
    for clip, without, box in zip(
        shown.frames.float(), bare.frames.float(), shown.boxes[:, -1], strict=True
    ):
        x0, y0, x1, y1 = box.round().int().tolist()
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        needle, elsewhere = clip[-1][inside].quantile(0.95), clip[-1][~inside].quantile(0.97)
        outshone.append(elsewhere > needle)
        change = [frames[:, inside].std(0).mean() for frames in (clip, without)]
        gain.append(change[0] / change[1])
    assert torch.stack(outshone).float().mean() > 0.2, "a threshold does not find the needle"
    assert torch.stack(gain).median() > 1.2, "the same place changes more where a needle advances"
    assert (torch.stack(gain) > 1).float().mean() > 0.8


def test_needles_are_all_there_at_the_end_and_some_come_later():
    settings = NeedleSettings(size=SIZE, needle_fraction=1.0)
    visible = ~simulate_clips(40, settings=settings).boxes.isnan().any(-1)
    assert visible[:, -1].all()
    assert (~visible[:, 0]).any()
