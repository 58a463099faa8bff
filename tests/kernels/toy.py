"""A kernel for tests of the compiler's harness; as a program it writes what compiling it gave.

``python -m tests.kernels.toy FILE``: a process of its own, in which Triton compiles and does not
interpret.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

from bench.cubins import ARCHITECTURES
from bench.triton_cubins import compiling_for


@triton.jit
def toy_kernel(source, target, BLOCK: tl.constexpr):
    """target = source @ source of one [BLOCK, BLOCK] tile, by way of shared memory."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tile = tl.load(source + row * BLOCK + column)
    tl.store(target + row * BLOCK + column, tl.dot(tile, tl.trans(tile)))


@triton.jit
def greedy_kernel(source, target, BLOCK: tl.constexpr):
    """target = source - max(source), all of which is in registers meanwhile."""
    at = tl.arange(0, BLOCK)
    numbers = tl.load(source + at)
    tl.store(target + at, numbers - tl.max(numbers))


def launch_all(source: torch.Tensor, target: torch.Tensor) -> None:
    """Twice the same; and once 4096 numbers in 32 threads of at most 64 registers each."""
    for _ in range(2):
        toy_kernel[(1,)](source, target, BLOCK=64, num_warps=4)
    greedy_kernel[(1,)](target, target, BLOCK=4096, num_warps=1, maxnreg=64)


def main() -> None:
    tensors = [torch.empty(64, 64, dtype=t, device="meta") for t in (torch.bfloat16, torch.float32)]
    launches = []
    for arch in ARCHITECTURES:
        with compiling_for(arch) as compiled:
            launch_all(*tensors)
        launches += compiled
    Path(sys.argv[1]).write_text(json.dumps([asdict(launch) for launch in launches]))


if __name__ == "__main__":
    main()
