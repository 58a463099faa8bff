"""The backends that the operator's tests run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attn_kd
from attn_kd.ops import extension, reference


def require_backend(name: str) -> str:
    status = attn_kd.available_backends()[name]
    if not status.available:
        pytest.skip(status.reason)
    return name


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend; the reference with blocks so small that most sizes need several."""
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 10_000)
    return require_backend(request.param)


@pytest.fixture
def cpu_backend() -> str:
    return require_backend("cpu")


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Kernels that multiply bfloat16 numbers in float32, not by dot-product instructions.

    Those round probabilities and gradients of logits to bfloat16 on the way into a product, as
    eager bfloat16 code does; without them, 16-bit inputs cost the rounding of the results alone.
    """
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
