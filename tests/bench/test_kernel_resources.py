"""What is compiled for the table of the kernels' needs, and how it is written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.cubins import ARCHITECTURES, Resources
from bench.kernel_calls import CALLS
from bench.kernel_resources import Row, table, work
from bench.nvcc_cubins import SOURCES, nvcc

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "kernel-resources.md"
NEEDS = Resources(registers=128, stack_bytes=0, local_bytes=0, shared_bytes=40 * 1024)
ROW = Row("triton", "one call", "a_kernel", 80, "64 × 32", 8, 2, True, NEEDS, "code for 80")


def needing(row: Row, **needs: int) -> Row:
    return replace(row, resources=replace(row.resources, **needs))


def test_architectures_stand_side_by_side():
    on_90 = needing(replace(ROW, arch=90, compiled="code for 90"), registers=200, stack_bytes=8)
    head, line = table([ROW, on_90])
    assert head[-4:] == [
        "registers, 80 / 90 / 100",
        "stack, B, 80 / 90 / 100",
        "shared, KiB, 80 / 90 / 100",
        "warps/SM, 80 / 90 / 100",
    ]
    assert line == [
        *("`a_kernel`", "one call", "64 × 32", "8", "2"),
        *("128 / 200 / –", "0 / 8 / –", "40 / 40 / –", "16 / 8 / –"),
    ]


def test_machine_code_of_several_calls_stands_once():
    again = replace(ROW, call="another call")
    other = replace(ROW, call="a third", compiled="other code")
    assert [line[1] for line in table([ROW, again, other])[1:]] == ["one call", "a third"]


def test_of_both_16_bit_types_the_one_that_needs_more_is_shown():
    half = replace(ROW, kernel="a_kernel<Float16>", compiled="half")
    brain = needing(replace(ROW, kernel="a_kernel<BFloat16>", compiled="brain"), registers=130)
    (line,) = table([half, brain])[1:]
    assert line[0] == "`a_kernel<16 bits>`" and line[5] == "130 / – / –"


def test_no_tuned_kernel_of_the_published_table_spills():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in RESULTS.read_text().splitlines()
        if line.startswith("| `")
    ]
    tuned = [line for line in lines if line[1].endswith(".cu") or CALLS[line[1]].tuned]
    assert {"head_dim 32", "head_dim 64", *(path.name for path in SOURCES)} <= {
        line[1] for line in tuned
    }
    stacks = {stack for line in tuned for stack in line[6].split(" / ")}
    assert stacks - {"–"} == {"0"}


def test_everything_is_compiled_for_every_architecture():
    sources = len(SOURCES) if nvcc() else 0
    assert len(work()) == len(ARCHITECTURES) * (len(CALLS) + sources)


def test_a_part_can_be_chosen():
    calls = [
        piece.args for piece in work(only="^head_dim 64, m(se|ask of pairs)$", architectures=[80])
    ]
    assert calls == [("head_dim 64, mask of pairs", 80), ("head_dim 64, mse", 80)]
