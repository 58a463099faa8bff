"""The backends that the operator's tests run on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import attn_kd
from attn_kd.ops import extension, reference
from tests.conftest import HAS_GPU
from tests.ops.covering import covering
from tests.ops.interpreter import hasten
from tests.ops.poison import poisoned_scratch, poisoned_tensors  # noqa: F401  (fixtures)

hasten()


def require_backend(name: str) -> str:
    status = attn_kd.available_backends()[name]
    if not status.available:
        pytest.skip(status.reason)
    return name


@pytest.fixture(params=["cpu", "reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend; the reference with blocks so small that most sizes need several.

    With "triton" on a machine with a GPU, tensors are made there unless a test says otherwise.
    """
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 10_000)
    name = require_backend(request.param)
    if name == "triton" and HAS_GPU:
        with torch.device("cuda"):
            yield name
    else:
        with np.errstate(all="ignore"):  # Triton's interpreter computes with numpy
            yield name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave Triton without float64; where it is interpreted, with every parameter's values alone.

    What the others would repeat, a machine with a GPU runs.
    """
    by_triton = [item for item in items if "triton" in backends_of(item)]
    kept = [item for item in by_triton if torch.float64 not in item.callspec.params.values()]
    left_out = set(by_triton) - set(kept if HAS_GPU else covering(kept))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def backends_of(item: pytest.Item) -> tuple:
    """The value of the fixture `backend` for a test, if it has one."""
    callspec = getattr(item, "callspec", None)
    return () if callspec is None else (callspec.params.get("backend"),)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip what turns out to be a test of float64 where the backend has none."""
    try:
        return (yield)
    except attn_kd.InputError as error:
        if "triton" in backends_of(item) and "float64 is for the CPU" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def cpu_backend() -> str:
    return require_backend("cpu")


@pytest.fixture
def exact_products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels that multiply 16-bit numbers in float32, not by dot products or tensor cores.

    Those round probabilities and gradients of logits to bfloat16 on the way into a product, as
    eager bfloat16 code does; without them, 16-bit inputs cost the rounding of the results alone.
    """
    if "triton" in backends_of(request.node):
        pytest.skip("the Triton kernels multiply 16-bit numbers by tensor cores")
    module = extension.module
    dot_products = module is not None and module.instruction_set() == "avx512_bf16"
    if dot_products:
        module.set_instruction_set("avx512")
    yield
    if dot_products:
        module.set_instruction_set("avx512_bf16")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads: 1 but for tests that ask for another.

    The tensors here are so small that threads would mostly wait for each other, for long where the
    machine has other work too.
    """
    before, wanted = torch.get_num_threads(), getattr(request, "param", 1)
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)
