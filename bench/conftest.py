"""Options of the benchmarks, and what their JSON says about the machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

import attn_kd
from attn_kd.ops import extension
from bench.devices import default_device, describe_gpu
from bench.targets import GOALS

# A job that a script puts in the background ignores Ctrl-C, by which a limit of time ends it with
# what has been measured.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn_kd benchmarks")
    group.addoption(
        "--budget",
        type=float,
        default=4.0,
        metavar="SECONDS",
        help="time for the rounds of one measurement (default: 4); three rounds at the least",
    )
    group.addoption(
        "--device",
        type=torch.device,
        default=default_device(),
        help="cpu or cuda (default: cuda where torch finds a GPU)",
    )
    group.addoption("--threads", type=int, default=None, help="threads of torch (default: its own)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads") is not None:
        torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    absent = {"cpu": "gpu", "cuda": "cpu_only"}[device.type]
    for item in items:
        if item.get_closest_marker(absent):
            item.add_marker(pytest.mark.skip(reason=f"not measured on {device}"))
    if device.type == "cuda":
        items.sort(key=_rank_on_gpu)


def _rank_on_gpu(item: pytest.Item) -> int:
    """The place in the order of worth: a GPU's time may end before the benchmarks do.

    First what there are goals for, then what only a GPU can show, and float32 last.
    """
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    shape, dtype = params.get("shape_name"), params.get("dtype_name")
    aims = {(goal.shape, goal.dtype) for goal in GOALS if goal.device == "cuda"}
    if item.path.stem == "bench_attention_kl" and (shape, dtype) in aims:
        return 0
    return 1 if item.get_closest_marker("gpu") else 3 if dtype == "float32" else 2


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Where one is interrupted, let pytest-benchmark save the others, as where one fails."""
    try:
        return (yield)
    except KeyboardInterrupt:
        item.funcargs["benchmark"].has_error = True
        raise


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
    machine_info["gpu"] = describe_gpu(config.getoption("--device"))
    machine_info["triton"] = _installed("triton")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> float:
    """Seconds for the rounds of one measurement."""
    return request.config.getoption("--budget")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the candidates run."""
    return pytestconfig.getoption("--device")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """That many threads of torch, for the test; parametrized indirectly."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
