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
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

import attn_kd.kernels
from attn_kd.kernels.triton import configurations
from attn_kd.kernels.triton.configurations import KERNELS, WIDTHS, Extras
from attn_kd.ops import backends
from bench.cubins import ARCHITECTURES, Resources
from bench.kernel_calls import CALLS, DTYPES, FEW_HEADS, HEADS, tile_of
from bench.kernel_resources import Row
from bench.nvcc_cubins import SOURCES, nvcc
from tests.kernels.test_compiling_driver import ROOT, compiling_environment

SOURCE = Path(attn_kd.kernels.__file__).parent
# A multiprocessor has four schedulers, and one of two warps computes while the other waits.
LEAST_WARPS = 8
# Twice as many, which hide more: what one-pass calls that ask for nothing besides hold, by kernel
# and width, where no more than 128 registers a thread will do.
BUSY_WARPS = 16
BUSY = {
    80: {("forward", 32), ("backward_rows", 32)},
    90: {*product(("forward", "backward_rows"), (32, 64))},
    100: {("forward", 32), *product(("backward_rows",), (32, 64))},
}
# The tables are made with Triton 3.7 and 3.9. That of 3.6 spills a few bytes of a thread in five
# kernels of tuned calls (of gradients of keys, and on sm_100 of the slopes of averaged maps), and
# takes 142 registers for the narrowest forward pass on sm_100.
MOST_SPILLED = dict.fromkeys(ARCHITECTURES, 0)
if version("triton").startswith("3.6."):
    MOST_SPILLED |= {80: 16, 100: 8}
    BUSY[100] -= {("forward", 32)}
# sm_86, sm_89 and sm_120 run what is compiled as for sm_80, in 100 KiB of shared memory, of which
# the system has one. Wider heads are refused there.
LITTLE_SHARED, LITTLE_SHARED_WIDTH = 99 * 1024, backends._LITTLE_SHARED_WIDTH


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


@pytest.fixture
def triton_rows(rows, arch) -> list[Row]:
    """Of one architecture."""
    return [row for row in rows if (row.backend, row.arch) == ("triton", arch)]


@pytest.fixture
def cuda_rows(rows, arch) -> list[Row]:
    if nvcc() is None:
        pytest.skip("there is no nvcc")
    return [row for row in rows if (row.backend, row.arch) == ("cuda", arch)]


every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


def launched_functions() -> set[str]:
    """Triton's: names that end as no helper's does."""
    return {
        node.name
        for path in (SOURCE / "triton").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def extras_of(kernel: str) -> list[Extras]:
    """All that a kernel may be asked for: js takes two passes."""
    everything = [Extras(*flags) for flags in product((False, True), repeat=len(Extras._fields))]
    two_passes = kernel.startswith(("two_pass", "group"))
    return [extras for extras in everything if two_passes or not extras.js]


def test_the_tables_have_every_kernel_and_width_and_nothing_else():
    everything = set(product(KERNELS, WIDTHS))
    assert configurations._HALF.keys() == configurations._FLOAT.keys() == everything
    # One has no tiling of its own: a row's constants take that of the kernel after it.
    tiled = {f"{kernel}_kernel" for kernel in KERNELS}
    assert launched_functions() - tiled == {"row_constants_kernel"}


@pytest.mark.slow
@every_arch
def test_every_triton_kernel_is_compiled_in_every_tiling_of_the_tables(triton_rows, arch):
    compiled = {
        (row.kernel, call.head_dim, call.dtype, row.tile, row.warps, row.stages)
        for row in triton_rows
        for call in [CALLS[row.call]]
    }
    expected = set()
    for kernel, width, dtype, heads in product(KERNELS, WIDTHS, DTYPES, (HEADS, FEW_HEADS)):
        for extras in extras_of(kernel):
            tile = tile_of(kernel, width, dtype, arch, heads, extras)
            shape = (f"{tile.block_q} × {tile.block_k}", tile.num_warps, tile.num_stages)
            expected.add((f"{kernel}_kernel", width, dtype, *shape))
    assert expected - compiled == set()


@pytest.mark.slow
@every_arch
def test_every_cuda_kernel_is_compiled(cuda_rows, arch):
    text = "".join(path.read_text() for path in (SOURCE / "cuda").glob("*.cu*"))
    declared = set(re.findall(r"__global__ void (?:__launch_bounds__\(.*\)\s)?\s*(\w+)\(", text))
    assert {row.kernel.partition("<")[0] for row in cuda_rows} == declared != set()
    assert {row.call for row in cuda_rows} == {path.name for path in SOURCES}


@pytest.mark.slow
def test_tuned_kernels_do_not_spill(rows):
    most = {"triton": MOST_SPILLED, "cuda": dict.fromkeys(ARCHITECTURES, 0)}
    assert not [
        row
        for row in rows
        if row.tuned and row.resources.spilled_bytes > most[row.backend][row.arch]
    ]


@pytest.mark.slow
def test_every_scheduler_has_two_warps(rows):
    assert not [row for row in rows if row.resident_warps < LEAST_WARPS]


@pytest.mark.slow
@every_arch
def test_the_main_kernels_hold_twice_as_many(triton_rows, arch):
    busy = {
        (row.kernel.removesuffix("_kernel"), CALLS[row.call].head_dim)
        for row in triton_rows
        if row.call in ("head_dim 32", "head_dim 64") and row.resident_warps >= BUSY_WARPS
    }
    assert busy >= BUSY[arch]


@pytest.mark.slow
@every_arch
def test_a_cuda_kernel_of_32_columns_holds_twice_as_many(cuda_rows, arch):
    narrow = [row for row in cuda_rows if re.search(r"Shape<\w+, 32,", row.kernel)]
    assert narrow and not [row for row in narrow if row.resident_warps < BUSY_WARPS]


@pytest.mark.slow
def test_blocks_fit_a_small_multiprocessor(rows):
    fitting = [
        row
        for row in rows
        if row.arch == 80
        and (row.backend == "cuda" or CALLS[row.call].head_dim <= LITTLE_SHARED_WIDTH)
    ]
    assert not [row for row in fitting if row.resources.shared_bytes > LITTLE_SHARED]
