"""What the build of this installation recorded, so that a missing extension can be explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

RECORD = Path(__file__).with_name("_build.json")


class BuildRecord(NamedTuple):
    """The outcome of the last build; written by setup.py."""

    extension: bool  # whether attn_kd._C was built
    reason: str | None  # why it was not
    torch: str | None  # version of the torch it was built against


def build_record() -> BuildRecord | None:
    """Return the record of the build, None in a source tree that was never built or installed."""
    try:
        return BuildRecord(**json.loads(RECORD.read_text()))
    except FileNotFoundError:
        return None


def missing_extension_reason() -> str:
    """Say in one line why ``attn_kd._C`` is absent."""
    record = build_record()
    if record is None:
        return "this source tree was not built: run `pip install --no-build-isolation -e .`"
    return record.reason or "it was built but has since been removed: install attn_kd again"
