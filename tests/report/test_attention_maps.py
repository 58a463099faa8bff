"""The maps shown are those that distillation compares."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

pytest.importorskip("transformers")

from attn_kd.distill import AttentionDistiller
from attn_kd.report.attention_maps import encoder_attention, row_divergence


@pytest.fixture
def image():
    return PIL.Image.effect_noise((90, 60), 60)


def test_rows_are_distributions(detectors, image):
    attention = encoder_attention(detectors["student"], image)
    assert attention.maps.shape[1] == attention.height * attention.width
    torch.testing.assert_close(attention.maps.sum(dim=-1), torch.ones(attention.maps.shape[:2]))
    assert attention.row(0).shape == (attention.height, attention.width)


def test_mean_of_the_rows_is_the_distillers_divergence(detectors, image):
    teacher, student = (encoder_attention(detectors[role], image) for role in detectors)
    rows = [row_divergence(student, teacher, token) for token in range(teacher.maps.shape[1])]
    models = [detectors[role].model for role in detectors]
    batch = detectors["student"].processor(images=[image.convert("RGB")], return_tensors="pt")
    for model in models:
        model.set_attn_implementation({"": "sdpa"})
    with torch.no_grad(), AttentionDistiller(*models) as distiller:
        expected = distiller(**batch).attention_kl.item()
    assert expected > 1e-4
    assert sum(rows) / len(rows) == pytest.approx(expected, rel=1e-3)


def test_divergence_from_itself_is_zero(detectors, image):
    attention = encoder_attention(detectors["teacher"], image)
    assert row_divergence(attention, attention, token=5) == 0.0


@pytest.mark.parametrize(
    ("x", "y", "row", "column"), [(0, 0, 0, 0), (0.99, 0, 0, -1), (0, 1, -1, 0), (1, 1, -1, -1)]
)
def test_token_covers_the_point(detectors, image, x, y, row, column):
    attention = encoder_attention(detectors["teacher"], image)
    grid = torch.arange(attention.height * attention.width)
    grid = grid.view(attention.height, attention.width)
    assert attention.token_at(x, y) == grid[row, column]
