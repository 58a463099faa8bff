"""The emulated GPU: the kernels' sources, compiled with the emulation once per session."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda.emulated import EmulatedGPU, compile_library, compile_operators, obstacle


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C functions of kernels/cuda and of the emulation."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    return compile_library(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(params=[0, 1000], ids=["64rows", "32rows"])
def gpu(library: ctypes.CDLL, request: pytest.FixtureRequest) -> EmulatedGPU:
    """One where kernels choose large blocks, one where they choose small ones."""
    return EmulatedGPU(library, request.param)


@pytest.fixture(scope="session")
def compiled_operators(library: ctypes.CDLL) -> torch._ops._OpNamespace:
    """The host code of csrc/cuda, compiled once per session."""
    compile_operators(library)
    return torch.ops.attn_kd_emulated


@pytest.fixture
def operators(
    library: ctypes.CDLL, compiled_operators: torch._ops._OpNamespace
) -> torch._ops._OpNamespace:
    """The operators on CPU tensors, forward and backward, on an emulated GPU as if new."""
    library.emulation_reset(1)
    return compiled_operators
