"""NVIDIA's software on this machine that torch does not tell of: the compiler and the driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path


def find_nvcc() -> str | None:
    """Return the path of the CUDA toolkit's compiler, as torch's builds and so ours find it.

    CUDA_HOME or CUDA_PATH names the toolkit; without them it is the one on PATH, or in its usual
    place.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=Path(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_release(program: str) -> str | None:
    """Return the toolkit's release, such as "13.0"; None where the program does not say it."""
    said = _output_of(program, "--version")
    release = re.search(r"release ([\d.]+)", said)
    return release[1] if release else None


def driver_version() -> str | None:
    """Return the version of the GPUs' driver; None where there is none that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    said = _output_of(program, "--query-gpu=driver_version", "--format=csv,noheader")
    return said.partition("\n")[0].strip() or None  # a line for each GPU, all the same


def _output_of(*command: str) -> str:
    """What a program prints; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # not for this machine
        return ""
    return done.stdout if done.returncode == 0 else ""
