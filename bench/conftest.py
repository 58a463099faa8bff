"""Options of the benchmarks, and what their JSON says about the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attn_kd
from attn_kd.ops import extension


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn_kd benchmarks")
    group.addoption(
        "--budget",
        type=float,
        default=4.0,
        metavar="SECONDS",
        help="time for the rounds of one measurement (default: 4); three rounds at the least",
    )
    group.addoption("--threads", type=int, default=None, help="threads of torch (default: its own)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads") is not None:
        torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    module = extension.module
    machine_info["attn_kd"] = {
        "version": attn_kd.__version__,
        "instruction_set": module.instruction_set() if module else None,
        "backends": {name: able for name, (able, _) in attn_kd.available_backends().items()},
    }
    machine_info["torch"] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    machine_info["cpus"] = os.cpu_count()


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    """Seconds for the rounds of one measurement."""
    return request.config.getoption("--budget")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """That many threads of torch, for the test; parametrized indirectly."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
