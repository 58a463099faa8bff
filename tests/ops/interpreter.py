"""Triton's interpreter without what takes most of its time: for tests, which run many small calls.

It patches its whole language again whenever a kernel calls a function of its own, checks every sum
of integers for overflow, and converts to bfloat16 bit by bit, towards zero where GPUs round to the
nearest. That of Triton 3.6 also makes the bounds of a loop from arrays of one number, which NumPy
takes for numbers no more since its version 2.4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from attn_kd.ops import triton_installation
from attn_kd.ops.backends import interprets_triton


@functools.cache
def hasten() -> None:
    """Patch the language once a launch, and check nothing; of Triton 3.6 to 3.9.

    Nothing is done where kernels are not interpreted.
    """
    if not interprets_triton() or triton_installation.missing_reason() is not None:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_everything(_function: Any) -> Any:
        scope = patch(everything)
        scope.set_attr(tl.tensor, "__index__", lambda tensor: tensor.handle.data.item())
        return scope

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function.rewrite()(*args, **kwargs)

    interpreter._patch_lang = patch_everything
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._convert_float = _converting_bfloat16(interpreter._convert_float, tl)


def _converting_bfloat16(convert: Callable, tl: Any) -> Callable:
    """Triton's conversion of the numbers in an array, but for those between bfloat16 and float32,
    which are bytes of the one and the other."""

    def converted(numbers: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return (numbers.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(numbers).view(np.uint32)
            to_nearest_even = 0x7FFF + ((bits >> 16) & 1)
            return np.where(np.isnan(numbers), 0x7FC0, (bits + to_nearest_even) >> 16).astype(
                np.uint16
            )
        return convert(numbers, source, target, rounding)

    return converted
