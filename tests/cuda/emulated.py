"""The CUDA kernels on the emulated GPU of tests/cuda/emulation, called as the host code calls them.

The structures are those of kernels/cuda/attention_kl.h.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from tests.ops.cases import Cotangents, Inputs, Results

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda" / "emulation"
SOURCES = ("forward", "backward")  # kernels/cuda/attention_kl_*.cu
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.bool: 3}


class View(Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 3)]


class KeyMask(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("strides", c_int64 * 3)]


class Problem(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "heads", "query_length", "key_length", "head_dim")),
        ("dtype", c_int32),
        ("scale", c_float),
        ("teacher_scale", c_float),
        *((name, View) for name in ("query", "key", "value", "teacher_query", "teacher_key")),
        ("mask", KeyMask),
    ]


class ForwardProblem(Structure):
    _fields_ = [
        ("problem", Problem),
        ("given_teacher_lse", c_void_p),
        ("output", View),
        *((name, c_void_p) for name in ("kl", "lse", "teacher_lse")),
        *((name, c_void_p) for name in ("origin", "inverse_sum", "correction")),
    ]


class BackwardProblem(Structure):
    _fields_ = [
        ("problem", Problem),
        ("output", View),
        ("grad_output", View),
        *((name, c_void_p) for name in ("origin", "inverse_sum", "correction")),
        *((name, c_void_p) for name in ("teacher_lse", "grad_kl", "grad_lse")),
        *((name, View) for name in ("grad_query", "grad_key", "grad_value")),
    ]


def obstacle() -> str | None:
    """Why the emulation cannot be compiled here, if it cannot."""
    compiler = compile_command()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} was not found"
    command = [compiler, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True).stdout
    if "__FLT16_MAX__" not in macros:
        return f"{compiler} has no _Float16, which the emulation computes with (g++ 12 has)"
    return None


def compile_library(folder: Path) -> ctypes.CDLL:
    """Compile the kernels' sources with the emulation into one shared library, and load it."""
    kernels = [ROOT / "kernels" / "cuda" / f"attention_kl_{name}.cu" for name in SOURCES]
    flags = ["-O1", "-Werror", "-U_FORTIFY_SOURCE", "-DATTN_KD_CUDA_EMULATION", "-x", "c++"]
    library = folder / "libemulated.so"
    _compile(library, [*flags, *kernels, *sorted(EMULATION.glob("*.cpp"))])
    # Global, because the operators call it.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def compile_operators(library: ctypes.CDLL) -> None:
    """Compile the host code of csrc/cuda against the emulation; load torch.ops.attn_kd_emulated."""
    emulated = Path(library._name)
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    torch_libraries += ["-ltorch", "-ltorch_cpu", "-lc10"]
    operators = emulated.with_name("operators.so")
    arguments = [*torch_headers(), EMULATION / "operators.cc", emulated, *torch_libraries]
    _compile(operators, arguments)
    torch.ops.load_library(operators)


def compile_command() -> list[str]:
    """The C++ compiler with the flags that all files share."""
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC"]
    includes = [f"-I{path}" for path in (ROOT, EMULATION, ROOT / "kernels" / "cuda")]
    return [os.environ.get("CXX", "c++"), *flags, *includes]


def torch_headers() -> list[str]:
    """Flags that find them."""
    return [f"-isystem{path}" for path in cpp_extension.include_paths()]


def _compile(result: Path, arguments: list[str | Path]) -> None:
    command = [*compile_command(), "-shared", *map(str, arguments), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class EmulatedGPU:
    """A GPU of some multiprocessors: many make the kernels choose small blocks, 0 large ones."""

    def __init__(self, library: ctypes.CDLL, multiprocessors: int) -> None:
        self.library = library
        self.multiprocessors = multiprocessors
        library.attn_kd_cuda_error_string.restype = ctypes.c_char_p
        library.emulation_bank_conflicts.restype = c_int64
        library.emulation_launches.restype = c_int64
        library.attn_kd_cuda_forward.argtypes = [POINTER(ForwardProblem), c_void_p]
        library.attn_kd_cuda_backward.argtypes = [POINTER(BackwardProblem), c_void_p]
        library.emulation_add_buffer.argtypes = [c_void_p, c_int64, c_int32]

    @property
    def bank_conflicts(self) -> int:
        """Matrices of the last kernel's ldmatrix instructions whose rows share a bank."""
        return self.library.emulation_bank_conflicts()

    @property
    def launches(self) -> int:
        """Launches of the last call."""
        return self.library.emulation_launches()

    def forward(
        self,
        inputs: Inputs,
        *,
        teacher_lse: Tensor | None = None,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        teacher_scale: float | None = None,
    ) -> Results:
        """Return output, lse, row_state and, with a teacher, kl and the teacher_lse in use."""
        self.library.emulation_reset(self.multiprocessors)
        batch, heads, length, head_dim = inputs.query.shape
        rows = (batch, heads, length)
        results = {
            "output": torch.full((batch, length, heads, head_dim), torch.nan).to(inputs.query.dtype)
        }
        results["output"] = results["output"].transpose(1, 2)
        results["lse"] = torch.full(rows, torch.nan)
        results["row_state"] = torch.full((3, *rows), torch.nan)
        if inputs.teacher_query is not None:
            results["kl"] = torch.full(rows, torch.nan)
            if teacher_lse is None:
                results["teacher_lse"] = torch.full(rows, torch.nan)
        problem = ForwardProblem(
            self._problem(inputs, attn_mask, scale, teacher_scale),
            self._input(teacher_lse),
            self._view(results["output"], writable=True),
            *(self._output(results.get(name)) for name in ("kl", "lse", "teacher_lse")),
            *(self._output(row) for row in results["row_state"]),
        )
        self._check(self.library.attn_kd_cuda_forward(byref(problem), None))
        if teacher_lse is not None:
            results["teacher_lse"] = teacher_lse
        return results

    def backward(
        self, inputs: Inputs, of_forward: Results, cotangents: Cotangents, **options: Any
    ) -> Results:
        """Return the gradients of query, key and value, each in the layout of its tensor."""
        self.library.emulation_reset(self.multiprocessors)
        options.pop("teacher_lse", None)
        options = {"attn_mask": None, "scale": None, "teacher_scale": None} | options
        if cotangents.kl is None:
            inputs = inputs._replace(teacher_query=None, teacher_key=None)
        names = ("query", "key", "value")
        grads = {n: torch.full_like(getattr(inputs, n), torch.nan) for n in names}
        grad_output = cotangents.output
        problem = BackwardProblem(
            self._problem(inputs, **options),
            self._view(of_forward["output"] if grad_output is not None else None),
            self._view(grad_output),
            *(self._input(row) for row in of_forward["row_state"]),
            self._input(of_forward["teacher_lse"] if cotangents.kl is not None else None),
            self._input(cotangents.kl),
            self._input(cotangents.lse),
            *(self._view(grad, writable=True) for grad in grads.values()),
        )
        self._check(self.library.attn_kd_cuda_backward(byref(problem), None))
        return {f"grad_{name}": grad for name, grad in grads.items()}

    def run(self, inputs: Inputs, cotangents: Cotangents, **options: Any) -> Results:
        """Both passes; the results as tests.ops.cases.run names them."""
        results = self.forward(inputs, **options)
        grads = self.backward(inputs, results, cotangents, **options)
        return {n: results[n] for n in ("output", "kl", "lse") if n in results} | grads

    def _problem(
        self,
        inputs: Inputs,
        attn_mask: Tensor | None,
        scale: float | None,
        teacher_scale: float | None,
    ) -> Problem:
        batch, heads, length, head_dim = inputs.query.shape
        return Problem(
            *(batch, heads, length, inputs.key.shape[2], head_dim),
            DTYPES[inputs.query.dtype],
            head_dim**-0.5 if scale is None else scale,
            head_dim**-0.5 if teacher_scale is None else teacher_scale,
            *(self._view(tensor) for tensor in inputs),
            self._key_mask(attn_mask, (batch, heads, 1, inputs.key.shape[2])),
        )

    def _key_mask(self, mask: Tensor | None, shape: tuple[int, ...]) -> KeyMask:
        if mask is None:
            return KeyMask(None, 0, (0, 0, 0))
        mask_data = self._input(mask)
        batch_stride, head_stride, _, key_stride = mask.expand(shape).stride()
        return KeyMask(mask_data, DTYPES[mask.dtype], (batch_stride, head_stride, key_stride))

    def _view(self, tensor: Tensor | None, writable: bool = False) -> View:
        if tensor is None:
            return View(None, (0, 0, 0))
        assert tensor.stride(3) == 1
        return View(self._pointer(tensor, writable), tensor.stride()[:3])

    def _input(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._pointer(tensor, writable=False)

    def _output(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._pointer(tensor, writable=True)

    def _pointer(self, tensor: Tensor, writable: bool) -> int:
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        address = tensor.data_ptr()
        self.library.emulation_add_buffer(address, extent * tensor.element_size(), writable)
        return address

    def _check(self, error: int) -> None:
        assert error == 0, self.library.attn_kd_cuda_error_string(error).decode()
