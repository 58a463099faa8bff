"""The compiled module, its instruction sets, and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from attn_kd.ops import extension
from tests.ops.conftest import exact_products, threads  # noqa: F401  (fixtures)
from tests.ops.poison import poisoned_scratch  # noqa: F401  (a fixture)

INSTRUCTION_SETS = extension.module.supported_instruction_sets() if extension.module else []


@pytest.fixture
def module() -> ModuleType:
    """The compiled module attn_kd._C; the instruction set in use is put back afterwards."""
    if extension.module is None:
        pytest.skip(str(extension.missing_reason))
    return extension.module


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine can run, in use for the test."""
    assert extension.module is not None
    before = extension.module.instruction_set()
    extension.module.set_instruction_set(request.param)
    yield request.param
    extension.module.set_instruction_set(before)


@pytest.fixture
def filled_results() -> Iterator[None]:
    """Memory that torch hands out, as it does for results and partial sums, is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
