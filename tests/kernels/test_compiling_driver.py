"""Kernels are compiled, for GPUs that are not there, by launching them; and read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.runtime.driver import driver

from bench.cubins import ARCHITECTURES, Resources
from bench.triton_cubins import compiling_for

ROOT = Path(__file__).resolve().parents[2]


def compiling_environment() -> dict[str, str]:
    """This process's, but that Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("toy") / "launches.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.toy", file],
        cwd=ROOT,
        env=compiling_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_each_kind_of_launch_is_compiled_once_for_each_architecture(launches):
    found = [(launch["arch"], launch["kernel"]) for launch in launches]
    assert found == [(a, name) for a in ARCHITECTURES for name in ("toy_kernel", "greedy_kernel")]
    assert [launch["constants"] for launch in launches[:2]] == [{"BLOCK": 64}, {"BLOCK": 4096}]


def test_too_few_registers_are_seen_as_spills(launches):
    found = [Resources(**launch["resources"]) for launch in launches]
    assert [needs.spills for needs in found] == [False, True] * len(ARCHITECTURES)
    # Of 128 numbers a thread more than 64 are elsewhere.
    assert all(needs.stack_bytes > 64 * 4 for needs in found[1::2])


def test_shared_memory_holds_the_operand(launches):
    # On sm_90 and later the tensor cores read the [64, 64] tile of bfloat16 from there.
    needs = {launch["arch"]: Resources(**launch["resources"]) for launch in launches[::2]}
    assert needs[90].shared_bytes >= 64 * 64 * 2
    assert all(0 < needs[arch].shared_bytes < 64 * 1024 for arch in ARCHITECTURES)


def test_the_driver_there_was_is_back_afterwards():
    before = driver._active
    with pytest.raises(KeyError), compiling_for(90):
        assert driver.active.get_current_target().arch == 90
        raise KeyError
    assert driver._active is before


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "arch", "expected"),
    [
        (128, 0, 90, 2),  # 65536 registers of which a block has 128 * 256
        (129, 0, 90, 1),  # given out in units of 8: 136 * 256 twice is too much
        (32, 0, 90, 8),  # 64 warps
        (32, 100 * 1024, 90, 2),  # 228 KiB, of which 1 KiB a block is the system's
        (32, 100 * 1024, 80, 1),  # 164 KiB
    ],
)
def test_blocks_of_eight_warps_that_fit(registers, shared_bytes, arch, expected):
    needs = Resources(registers, stack_bytes=0, local_bytes=0, shared_bytes=shared_bytes)
    assert needs.blocks(arch, 8) == expected
