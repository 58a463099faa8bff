"""Compiles the CUDA C++ kernels for GPUs that are not there, where there is an nvcc."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from attn_kd._atomic import replacing_file
from attn_kd._nvidia import find_nvcc, nvcc_release

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
# As in setup.py; the last is one that torch adds.
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr")
TARGETS = {80: "80", 90: "90a", 100: "100"}
KEPT = ROOT / "build" / "cubins"


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return find_nvcc()


def compile_cubin(source: Path, arch: int) -> bytes:
    """The machine code for sm_`arch` of all kernels that a file instantiates.

    It is kept, and taken from there until a file that it may depend on has changed.

    Raises:
        RuntimeError: it does not compile; nvcc's words.
    """
    target = f"-gencode=arch=compute_{TARGETS[arch]},code=sm_{TARGETS[arch]}"
    command = [str(nvcc()), *FLAGS, f"-I{ROOT}", target, "-cubin", str(source)]
    kept = KEPT / f"{source.stem}-sm_{arch}-{_fingerprint(command, source)}.cubin"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with replacing_file(kept) as cubin:
            done = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{source.name} for sm_{arch}: {done.stderr or done.stdout}")
    return kept.read_bytes()


def _fingerprint(command: list[str], source: Path) -> str:
    """Of the compiler, how it is called, and all that it may read."""
    fingerprint = hashlib.sha256(repr((nvcc_release(command[0]), command)).encode())
    for path in (source, *sorted((ROOT / "kernels" / "cuda").glob("*.*"))):
        fingerprint.update(path.read_bytes())
    return fingerprint.hexdigest()[:16]


def readable(symbol: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return symbol
    name = subprocess.run([demangler, symbol], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"^void |\(\w+(::\w+)*(, \w+)*\)$", "", name)
    return re.sub(r"\b\w+::", "", name)
