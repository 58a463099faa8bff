"""Memory full of NaN, so that what is read before it is written, or never written, shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attn_kd.ops import extension
from tests.conftest import HAS_GPU


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """Compiled kernels find NaN in the scratch memory that they have not written."""
    if extension.module is None:
        yield
        return
    extension.module.poison_scratch(True)
    yield
    extension.module.poison_scratch(False)


@pytest.fixture(autouse=True)
def poisoned_tensors() -> Iterator[None]:
    """Tensors are NaN where no kernel has written them, results and scratch alike.

    Torch sees to it where it is to be deterministic; on a GPU that would warn of every matmul.
    """
    if HAS_GPU:
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
