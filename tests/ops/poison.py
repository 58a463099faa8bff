"""Scratch memory full of NaN, so that what a kernel reads before it has written it shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attn_kd.ops import extension


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """Compiled kernels find NaN in the scratch memory that they have not written."""
    if extension.module is None:
        yield
        return
    extension.module.poison_scratch(True)
    yield
    extension.module.poison_scratch(False)
