"""What the GPU kernels need of a multiprocessor, as compiled; none of this takes a GPU.

`bench/kernel_calls.py` says which calls are compiled, `bench/results/kernel-resources.md` has the
figures of all of them.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import attn_kd.kernels
from bench.cubins import ARCHITECTURES, Resources
from bench.kernel_resources import Row
from bench.nvcc_cubins import SOURCES, nvcc
from tests.kernels.test_compiling_driver import ROOT, compiling_environment

# A multiprocessor has four schedulers, and one of two warps computes while the other waits.
LEAST_WARPS = 8
MOST_REGISTERS = 255  # of a thread, on every architecture
KERNELS = Path(attn_kd.kernels.__file__).parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Row]:
    """Every kernel of the calls that are compiled here."""
    file = tmp_path_factory.mktemp("cubins") / "rows.json"
    command = [sys.executable, "-W", "ignore", "-m", "bench.kernel_resources", "--quick"]
    done = subprocess.run(
        [*command, "--json", file],
        cwd=ROOT,
        env=compiling_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(file.read_text())
    return [Row(**{**row, "resources": Resources(**row["resources"])}) for row in stored]


def triton_kernels() -> set[str]:
    """The functions that are launched: names that end as no helper's does."""
    return {
        node.name
        for path in (KERNELS / "triton").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_triton_kernel_is_compiled(rows, arch):
    compiled = {row.kernel for row in rows if row.backend == "triton"}
    assert compiled == triton_kernels()
    assert arch in {row.arch for row in rows if row.backend == "triton"}


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_cuda_kernel_is_compiled(rows, arch):
    text = "".join(path.read_text() for path in (KERNELS / "cuda").glob("*.cu*"))
    declared = set(re.findall(r"__global__ void (?:__launch_bounds__\(.*\)\s)?\s*(\w+)\(", text))
    compiled = {row.kernel.partition("<")[0] for row in rows if row.backend == "cuda"}
    assert compiled == declared != set()
    assert {row.call for row in rows if row.backend == "cuda"} == {path.name for path in SOURCES}
    assert arch in {row.arch for row in rows if row.backend == "cuda"}


@pytest.mark.slow
def test_tuned_kernels_do_not_spill(rows):
    assert not [row for row in rows if row.tuned and row.resources.spills]


@pytest.mark.slow
def test_a_block_fits_its_multiprocessor(rows):
    for row in rows:
        limits = ARCHITECTURES[row.arch]
        assert row.resources.registers <= MOST_REGISTERS, row
        assert row.resources.shared_bytes <= limits.block_shared_bytes, row


@pytest.mark.slow
def test_every_scheduler_has_two_warps(rows):
    assert not [row for row in rows if row.resident_warps < LEAST_WARPS]
