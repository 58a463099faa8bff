"""The compiled kernels have the instructions that they are meant to have; it takes no GPU.

The emulation computes what the functions of device.cuh promise. What their PTX asks for instead,
the assembler tells. Loops over fragments are unrolled and those over tiles are not, so that all of
the work on one tile, or on one part of it in the backward pass, stands in the code once.
"""

from __future__ import annotations

import re

import pytest

from bench.cubins import ARCHITECTURES, cuobjdump
from bench.nvcc_cubins import compile_cubin, nvcc
from tests.cuda.emulated import ROOT
from tests.cuda.machine_code import Kernel, disassemble, kernels_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc() is None, reason="there is no nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump"),
]

PART = 16  # columns of a tile's part in the backward pass

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


@every_arch
def test_both_types_and_all_shapes_are_compiled(arch):
    compiled = {
        (k.direction, k.element, k.head_dim, k.row_warps, k.teacher) for k in kernels_for(arch)
    }
    assert len(kernels_for(arch)) == len(compiled)
    assert compiled == {
        (direction, element, *shape, teacher)
        for direction, teachers in (("forward", 3), ("backward", 2))
        for element in ("BFloat16", "Float16")
        for shape in ((32, 4), (32, 2), (64, 4))
        for teacher in range(teachers)
    }


def products(kernel: Kernel) -> tuple[int, int]:
    """Products of a warp's rows and columns over head_dim: transposed tiles, and tiles.

    Forward S, T, and PV. Backward, of blocks that own keys, S, T, dP, and dK, dV; of those that own
    queries, S, T, dP, and dQ.
    """
    if kernel.direction == "forward":
        return kernel.maps, 1
    return 2 * (kernel.maps + 1), 2 + 1


def columns(kernel: Kernel) -> int:
    return kernel.warp_columns if kernel.direction == "forward" else PART


@every_arch
def test_products_are_those_of_tensor_cores(arch):
    """[16, 8] += [16, 16] [16, 8] of the element type with float32 sums, and no others."""
    names = {"BFloat16": "HMMA.16816.F32.BF16", "Float16": "HMMA.16816.F32"}
    for kernel in kernels_for(arch):
        fragments = columns(kernel) * kernel.head_dim // (8 * 16)
        expected = {names[kernel.element]: sum(products(kernel)) * fragments}
        assert kernel.count("HMMA") == expected, kernel


@every_arch
def test_matrices_are_loaded_as_they_lie_and_transposed(arch):
    """Four 8x8 matrices at a time, the right operands of two products."""
    for kernel in kernels_for(arch):
        quadruples = columns(kernel) * kernel.head_dim // (16 * 16)
        as_they_lie, transposed = (n * quadruples for n in products(kernel))
        expected = {"LDSM.16.M88.4": as_they_lie, "LDSM.16.MT88.4": transposed}
        assert kernel.count("LDSM") == expected, kernel


@every_arch
def test_tiles_are_copied_asynchronously(arch):
    """16 bytes of each operand past the first-level cache, for the first tile and for the next.

    The operands are K, Kt, V of keys, and Q, Qt, dO, O of queries. A predicate makes it zeros.
    """
    for kernel in kernels_for(arch):
        of_keys = kernel.maps + 1
        operands = of_keys if kernel.direction == "forward" else of_keys + kernel.maps + 2
        assert kernel.count("LDGSTS") == {"LDGSTS.E.BYPASS.128": 2 * operands}, kernel
        assert len(re.findall(r"LDGSTS\S+ \S+, \S+, !?P\d ;", kernel.code)) == 2 * operands, kernel
        assert kernel.count("LDGDEPBAR") and kernel.count("DEPBAR"), kernel


@every_arch
def test_one_exponential_an_element(arch):
    """Of the forward pass a second one where the teacher's LSE is not known.

    Beside that the rows' sums shrink: two rows of a lane for a tile, and their sums in two groups
    of warps at the end.
    """
    for kernel in kernels_for(arch):
        elements = 4 * columns(kernel) // 8  # of a lane
        if kernel.direction == "forward":
            origins = 2 if kernel.teacher == 2 else 1
            expected = origins * (elements + 2 + 2 * 2)
        else:
            expected = 2 * elements
        assert kernel.count("MUFU.EX2") == {"MUFU.EX2": expected}, kernel


@every_arch
def test_nothing_is_added_atomically_or_in_double_precision(arch):
    for kernel in kernels_for(arch):
        unwanted = [n for n in kernel.instructions if re.match(r"ATOM|RED\b|D(ADD|MUL|FMA|MMA)", n)]
        assert not unwanted, kernel


@pytest.fixture
def constants(arch: int) -> str:
    """The listing of constants.cu."""
    (code,) = disassemble(compile_cubin(ROOT / "tests" / "cuda" / "constants.cu", arch)).values()
    return code


@every_arch
@pytest.mark.parametrize(
    "word",
    ["c0003e00", "40490000", "3d000000"],
    ids=["float16 -2 above 1.5", "float32 of float16 3.140625", "2^-5"],
)
def test_the_assembler_computes_what_the_emulation_does(constants, word):
    """An instruction's immediate operand is the upper half of its first 64 bits."""
    assert re.search(rf"/\* 0x{word}[0-9a-f]{{8}} \*/", constants)


@every_arch
def test_the_lower_bfloat16_comes_last(constants):
    """Of the two numbers of an instruction that the assembler leaves to the GPU."""
    assert re.search(r"F2FP\.BF16\.(F32\.)?PACK_AB R\d+, R\d+, 1\.5 ;", constants)
