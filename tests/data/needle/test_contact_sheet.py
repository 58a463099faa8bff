"""The contact sheet: a row of every kind of clip."""

from __future__ import annotations

import numpy as np
import pytest

from attn_kd.data.needle import NeedleSettings
from attn_kd.data.needle.contact_sheet import contact_sheet
from attn_kd.errors import InputError

SMALL = NeedleSettings(size=48, frames=6)


def test_boxes_are_drawn_in_the_last_column_of_clips_with_a_needle():
    sheet = contact_sheet(columns=3, settings=SMALL)
    colours = np.asarray(sheet.convert("RGB")).reshape(sheet.height, sheet.width, 3)
    coloured = (colours[..., 0] != colours[..., 2]).any(axis=1)
    rows = np.array_split(coloured, 6)
    assert [bool(row.any()) for row in rows] == [True, True, False, True, True, False]
    last_column = 3 * (48 + 2)
    assert not (colours[:, :last_column, 0] != colours[:, :last_column, 2]).any()


def test_a_sheet_needs_clips_of_every_kind():
    with pytest.raises(InputError, match="every kind"):
        contact_sheet(settings=NeedleSettings(needle_fraction=0.0))
