"""Detectors to report on: untrained ones, since a report is about any."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def detectors():
    """A teacher and a student of the same grid and heads, with different weights."""
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    from attn_kd.inference import Detector
    from attn_kd.models import build_detr, build_image_processor

    def build(layers: int) -> Detector:
        model = build_detr("detr-tiny", encoder_layers=layers, decoder_layers=layers)
        return Detector(model, build_image_processor("detr-tiny"))

    return {"teacher": build(2), "student": build(1)}
