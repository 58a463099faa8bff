"""Show what this installation is and what it can use.

The versions of attn_kd and of the packages it builds on, the backends with the reason why each
refused one cannot run, the instruction set of the compiled kernels, threads, GPUs and what there
is of CUDA. Paste its output into a bug report.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import attn_kd
from attn_kd._build import build_record, missing_cuda_reason
from attn_kd._nvidia import driver_version, find_nvcc, nvcc_release
from attn_kd.ops import extension

PACKAGES = ("torch", "numpy", "transformers", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` has no options of its own."""


def run(args: argparse.Namespace) -> int:
    for title, rows in (
        ("versions", _versions()),
        ("backends", _backends()),
        ("kernels", _kernels()),
        ("machine", _machine()),
        ("cuda", _cuda()),
    ):
        width = max(len(name) for name, _ in rows)
        print(f"{title}:")
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")
    return 0


def _versions() -> list[tuple[str, str]]:
    rows = [("attn_kd", attn_kd.__version__), ("python", platform.python_version())]
    return rows + [(package, _installed(package)) for package in PACKAGES]


def _installed(package: str) -> str:
    if package == "torch":
        return torch.__version__  # the metadata of a wheel may not say for which CUDA it is
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backends() -> list[tuple[str, str]]:
    statuses = attn_kd.available_backends().items()
    return [(name, f"{'yes' if able else 'no '}  {reason}") for name, (able, reason) in statuses]


def _kernels() -> list[tuple[str, str]]:
    if extension.module is None:
        return [("extension", str(extension.missing_reason))]
    record = build_record()
    built_for = f"built for torch {record.torch}" if record else "built outside setup.py"
    module = extension.module
    features = module.features()
    return [
        ("extension", f"{built_for}, with compiler {features['compiler']}"),
        ("instruction set", f"{module.instruction_set()}, in use"),
        ("compiled", ", ".join(module.compiled_instruction_sets())),
        ("runs here", ", ".join(module.supported_instruction_sets())),
        ("cuda", "compiled in" if features["cuda"] else _why_without_cuda()),
    ]


def _why_without_cuda() -> str:
    reason = missing_cuda_reason()
    return f"not compiled in: {reason}" if reason else "not compiled in"


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("platform", platform.platform()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical CPUs"),
    ]
    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch finds no device"
        return [*rows, ("gpu", f"none ({why})")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {device.major}.{device.minor}"
        rows.append((f"gpu {index}", f"{device.name}, {memory}, {capability}"))
    return rows


def _cuda() -> list[tuple[str, str]]:
    release = torch.version.cuda
    built = "a CPU build" if release is None else f"built for {release}"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return [
        ("torch", built),
        ("cudnn", str(cudnn or "none")),
        ("driver", driver_version() or "none"),
        ("nvcc", _nvcc()),
    ]


def _nvcc() -> str:
    program = find_nvcc()
    if program is None:
        return "not found"
    return f"{nvcc_release(program) or 'of an unknown version'}, {program}"
