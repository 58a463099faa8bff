"""Compiles the CUDA C++ kernels for GPUs that are not there, where there is an nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from attn_kd._nvidia import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
# As in setup.py; the last is one that torch adds.
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr")
TARGETS = {80: "80", 90: "90a", 100: "100"}


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return find_nvcc()


def compile_cubin(source: Path, arch: int) -> bytes:
    """The machine code for sm_`arch` of all kernels that a file instantiates.

    Raises:
        RuntimeError: it does not compile; nvcc's words.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        target = f"-gencode=arch=compute_{TARGETS[arch]},code=sm_{TARGETS[arch]}"
        command = [nvcc(), *FLAGS, f"-I{ROOT}", target, "-cubin", "-o", cubin, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} for sm_{arch}: {done.stderr or done.stdout}")
        return cubin.read_bytes()


def readable(symbol: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return symbol
    name = subprocess.run([demangler, symbol], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"^void |\(\w+(::\w+)*(, \w+)*\)$", "", name)
    return re.sub(r"\b\w+::", "", name)
