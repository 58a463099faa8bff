"""A detector that finds something: untrained, so its scores are middling and all are kept."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def detector():
    pytest.importorskip("transformers")
    import torch

    from attn_kd.inference import Detector
    from attn_kd.models import build_detr, build_image_processor

    torch.manual_seed(0)
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, id2label={0: "needle"})
    return Detector(model, build_image_processor("detr-tiny"))
