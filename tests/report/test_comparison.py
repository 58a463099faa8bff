"""What is kept of the measurements."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")

from attn_kd.report.comparison import _json_numbers


def test_precision_of_nothing_is_no_number():
    metrics = {"mAP50": 0.5, "mAP50_short": math.nan, "num_images": 3}
    assert _json_numbers(metrics) == {"mAP50": 0.5, "mAP50_short": None, "num_images": 3}
