"""Registers, spills and shared memory of every GPU kernel, from cubins; no GPU is needed.

    python -m bench.kernel_resources > bench/results/kernel-resources.md
    python -m bench.kernel_resources --arch 80 --only "head_dim 64.*js"    a part of it

Triton kernels are compiled by the calls of `kernel_calls.py`, CUDA C++ kernels where there is an
nvcc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cubins import ARCHITECTURES, Resources, read_resources
from bench.nvcc_cubins import SOURCES, compile_cubin, nvcc, readable
from bench.tables import markdown

if TYPE_CHECKING:
    from bench.triton_cubins import Launch  # imports Triton

# For which architecture the tests compile what calls of the tuned widths may ask for, where it has
# no tilings of its own there.
QUICK_ARCHS = {32: 90, 64: 80}
NOTE = (
    "Of each kernel as it is compiled for the architecture: registers and bytes of stack of a "
    "thread (a stack is spilled registers), shared memory of a block, and the warps that a "
    "multiprocessor can hold at a time; for sm_80 / sm_90 / sm_100. What several calls launch "
    "stands at the first. The kernels were compiled, not run."
)


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one architecture."""

    backend: str  # "triton" or "cuda"
    call: str  # of `CALLS`, or the source file
    kernel: str
    arch: int
    tile: str  # rows × keys of the attention map
    warps: int  # of a block
    stages: int
    tuned: bool
    resources: Resources
    compiled: str  # what identifies the machine code among those of one architecture

    @property
    def names(self) -> tuple[str, ...]:
        """What a line of the table is about: this kernel for any architecture or 16-bit type."""
        kernel = re.sub(r"\bB?Float16\b", "16 bits", self.kernel)
        return (f"`{kernel}`", self.call, self.tile, str(self.warps), str(self.stages))

    @property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor can hold."""
        return self.warps * self.resources.blocks(self.arch, self.warps)


FIGURES: dict[str, Callable[[Row], str]] = {
    "registers": lambda row: str(row.resources.registers),
    "stack, B": lambda row: str(row.resources.stack_bytes),
    "shared, KiB": lambda row: f"{row.resources.shared_bytes / 1024:.0f}",
    "warps/SM": lambda row: str(row.resident_warps),
}
Piece = Callable[[], list[Row]]  # of the work


def triton_rows(call: str, arch: int) -> list[Row]:
    """The kernels that a call of `CALLS` launches."""
    from bench.kernel_calls import CALLS
    from bench.triton_cubins import compiling_for

    with compiling_for(arch) as launches:
        CALLS[call].run()
    return rows_of(launches, call, CALLS[call].tuned)


def rows_of(launches: Sequence[Launch], call: str, tuned: bool) -> list[Row]:
    """The kernels that a call has launched."""
    rows = []
    for launch in launches:
        variant = launch.constants["V"]
        tile = f"{variant.block_q.value} × {variant.block_k.value}"
        shape = (launch.arch, tile, launch.warps, launch.stages, tuned)
        found = (launch.resources, launch.compiled)
        rows.append(Row("triton", call, launch.kernel, *shape, *found))
    return rows


def cuda_rows(source: Path, arch: int) -> list[Row]:
    """The kernels that a CUDA C++ file instantiates."""
    rows = []
    for symbol, resources in sorted(read_resources(compile_cubin(source, arch)).items()):
        shape = ("", (resources.threads or 0) // 32, 1, True)
        found = (resources, symbol)
        rows.append(Row("cuda", source.name, readable(symbol), arch, *shape, *found))
    return rows


def work(
    quick: bool = False, only: str = "", architectures: Sequence[int] = tuple(ARCHITECTURES)
) -> list[Piece]:
    """What is to be compiled.

    Args:
        quick: what the tests compile: every tiling for every architecture, and what else calls of
            the tuned widths may ask for, for one of them.
        only: of the calls and source files in whose names this regular expression is found.
    """
    from bench.kernel_calls import CALLS, FOR_THE_TILINGS

    pieces: list[Piece] = []
    for arch in architectures:
        for name, call in CALLS.items():
            own = name in FOR_THE_TILINGS[arch]
            wanted = not quick or own or (call.tuned and arch == QUICK_ARCHS[call.head_dim])
            if wanted and re.search(only, name):
                pieces.append(partial(triton_rows, name, arch))
        if nvcc():
            sources = [source for source in SOURCES if re.search(only, source.name)]
            pieces += [partial(cuda_rows, source, arch) for source in sources]
    return pieces


def compile_all(pieces: Sequence[Piece], jobs: int) -> list[Row]:
    """The rows of all pieces, in their order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(piece) for piece in pieces]
        return [row for future in futures for row in future.result()]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each kernel and tiling, its figures for all architectures side by side.

    Of kernels that differ in the 16-bit type alone, the one that needs more; of the same machine
    code for several calls, the first.
    """
    lines: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: (row.resources.stack_bytes, row.resources.registers)):
        lines.setdefault(row.names, {})[row.arch] = row
    in_order = dict.fromkeys(row.names for row in rows)
    by_code: dict[tuple[tuple[int, str], ...], tuple[str, ...]] = {}
    for names in in_order:
        code = tuple(sorted((arch, row.compiled) for arch, row in lines[names].items()))
        by_code.setdefault(code, names)
    head = ["kernel", "call", "tile", "warps", "stages"]
    archs = " / ".join(str(arch) for arch in ARCHITECTURES)
    return [
        [*head, *(f"{figure}, {archs}" for figure in FIGURES)],
        *([*names, *_figures(lines[names])] for names in by_code.values()),
    ]


def _figures(by_arch: dict[int, Row]) -> list[str]:
    return [
        " / ".join(read(by_arch[arch]) if arch in by_arch else "–" for arch in ARCHITECTURES)
        for read in FIGURES.values()
    ]


def document(rows: Sequence[Row]) -> str:
    """The tables with what they were made by."""
    parts = ["# What the GPU kernels need", NOTE, f"Compiled by {compilers()}."]
    for backend, title in (("triton", "Triton"), ("cuda", "CUDA C++")):
        chosen = [row for row in rows if row.backend == backend]
        if chosen:
            parts += [f"## {title}", markdown(table(chosen))]
    return "\n\n".join(parts)


def compilers() -> str:
    """Names and versions."""
    named = [f"Triton {version('triton')}"]
    program = nvcc()
    if program:
        said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        named.append(f"nvcc {said.split(' release ')[-1].split(',')[0]}")
    return ", ".join(named)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernel_resources", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="only what the tests compile")
    parser.add_argument("--only", default="", metavar="REGEX", help="only calls or files named so")
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=ARCHITECTURES,
        default=list(ARCHITECTURES),
        help="only for these architectures",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="compiling at a time (default: 2)")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # it is to compile here
    rows = compile_all(work(args.quick, args.only, args.arch), args.jobs)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(document(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
