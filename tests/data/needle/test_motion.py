"""Motion: tissue sways smoothly, the needle advances on its own."""

from __future__ import annotations

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
    tissue = grids(40).diff(dim=1).norm(dim=-1).sum(1).mean((1, 2))
    assert (advance > tissue).float().mean() > 0.6


def test_needles_are_all_there_at_the_end_and_some_come_later():
    settings = NeedleSettings(size=SIZE, needle_fraction=1.0)
    visible = ~simulate_clips(40, settings=settings).boxes.isnan().any(-1)
    assert visible[:, -1].all()
    assert (~visible[:, 0]).any()
