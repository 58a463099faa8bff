"""The kernels' arguments, made of a problem's tensors: one place, for launches and for tests.

A `Launch` is a description. Its tensors may be of the meta device: then it says what a kernel would
be compiled for. Importing this module imports Triton.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attn_kd.kernels.triton.backward import backward_keys_kernel, backward_rows_kernel
from attn_kd.kernels.triton.configurations import Extras, Tiling, tiling
from attn_kd.kernels.triton.forward import RowResults, forward_kernel
from attn_kd.kernels.triton.operands import Mask, Operand, Scales, Student, Teacher
from attn_kd.kernels.triton.philox import Noise
from attn_kd.kernels.triton.row_constants import RowGradients, row_constants_kernel
from attn_kd.kernels.triton.variant import Variant
from attn_kd.ops.triton_problem import Facts, Problem, products_precision

LOG2E = math.log2(math.e)

Arguments = dict[str, Any]


class Launch(NamedTuple):
    """A kernel and all it is launched with."""

    kernel: Any  # a function under triton.jit
    programs: int
    arguments: Arguments  # by the kernel's parameters
    options: dict[str, Any]  # the compiler's

    def run(self) -> None:
        """Enqueue it on the current stream of the current device."""
        self.kernel[(self.programs,)](**self.arguments, **self.options)


def is_interpreted() -> bool:
    """Whether the kernels were imported for Triton's interpreter."""
    return type(forward_kernel).__name__ == "InterpretedFunction"


def architecture() -> int:
    """The compute capability that kernels are compiled for, as 80, 90 or 100; 0 if interpreted."""
    if is_interpreted():
        return 0
    return _architecture(triton.runtime.driver.active.get_current_device())


@functools.lru_cache
def _architecture(_device: int) -> int:
    return triton.runtime.driver.active.get_current_target().arch


def forward_launch(
    problem: Problem,
    output: Tensor,  # [B, H, Lq, Dv]
    kl: Tensor | None,  # [B, H, Lq], like those that follow; None where nobody asks
    lse: Tensor,
    teacher_lse: Tensor | None,  # where it is to be computed
    teacher_lse_rest: Tensor | None,  # what rounding dropped of it
    row_state: Tensor,  # [3, B, H, Lq]
) -> Launch:
    """The forward pass of one sweep over the keys: all of it, or the first of two passes."""
    variant, tile = make_variant("forward", problem, value_dim=problem.facts.value_dim)
    arguments = {
        "student": student_of(problem),
        "teacher": teacher_of(problem, problem.operands.teacher_lse),
        "mask": mask_of(problem),
        "noise": noise_of(problem),
        "output": operand(output if problem.facts.value_dim else None),
        "results": RowResults(kl, lse, teacher_lse, teacher_lse_rest, row_state),
        "scales": scales_of(problem),
        **problem.facts.sizes,
        "V": variant,
    }
    return launch(forward_kernel, problem, tile, "query_length", tile.block_q, arguments)


def launch(
    kernel: Any,
    problem: Problem,
    tile: Tiling,
    length: str,
    block: int,
    arguments: Arguments,
) -> Launch:
    """A launch with one program for every `block` of `length` in every head."""
    sizes = problem.facts.sizes
    programs = sizes["batch_heads"] * -(-sizes[length] // block)
    return Launch(kernel, programs, arguments, compiler_options(tile))


@functools.lru_cache
def compiler_options(tile: Tiling) -> dict[str, Any]:
    """The options of a compilation."""
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def make_variant(
    kernel: str,
    problem: Problem,
    *,
    value_dim: int,
    divergence: str | None = None,
    reads_teacher: bool = True,
) -> tuple[Variant, Tiling]:
    """What the kernel is compiled for, and its tiling.

    `divergence` is the problem's where it is not given; without one there is no teacher. A kernel
    that does not read the teacher has a tiling as if it did.
    """
    facts = problem.facts
    divergence = facts.divergence if divergence is None else divergence
    teacher_dim = facts.teacher_dim if divergence != "none" else 0
    itemsize = max(facts.student_itemsize, facts.teacher_itemsize if teacher_dim else 0)
    tile = tiling(
        kernel,
        max(facts.head_dim, value_dim, teacher_dim),
        itemsize,
        architecture(),
        facts.sizes["batch_heads"],
        facts.sizes["key_length" if kernel == "backward_keys" else "query_length"],
        _extras(facts, divergence),
    )
    precision = products_precision() if itemsize == 4 else "ieee"
    reads_teacher = reads_teacher and teacher_dim > 0
    return _variant_of(facts, tile, value_dim, divergence, reads_teacher, precision), tile


@functools.lru_cache(maxsize=4096)
def _extras(facts: Facts, divergence: str) -> Extras:
    strides = facts.mask_strides
    return Extras(
        mask_of_pairs=strides is not None and strides[2] != 0,
        dropout=facts.dropout_p > 0.0,
        js=divergence == "js",
    )


@functools.lru_cache(maxsize=4096)
def _variant_of(
    facts: Facts,
    tile: Tiling,
    value_dim: int,
    divergence: str,
    reads_teacher: bool,
    precision: str,
) -> Variant:
    return _variant(
        block_q=tile.block_q,
        block_k=tile.block_k,
        head_dim=facts.head_dim,
        value_dim=value_dim,
        teacher_dim=facts.teacher_dim if reads_teacher else 0,
        divergence=divergence,
        group=facts.group if reads_teacher else 1,
        teacher_lse_given=divergence != "none" and facts.teacher_lse_given,
        masked=facts.mask_strides is not None,
        mask_per_key=facts.mask_strides is not None and facts.mask_strides[2] == 0,
        dropout=facts.dropout_p > 0.0 and value_dim > 0,
        precision=precision,
        rescale_above=tile.rescale_above,
        last_apart=tile.last_apart,
        interpreted=is_interpreted(),
    )


# One object for all facts that give the same: Triton compares those it was launched with.
_variant = functools.lru_cache(maxsize=1024)(Variant)


def student_of(problem: Problem) -> Student:
    """The student's tensors as a kernel takes them."""
    query, key, value, *_ = problem.operands
    has_value = problem.facts.value_dim > 0
    return Student(operand(query), operand(key), operand(value if has_value else None))


def teacher_of(problem: Problem, teacher_lse: Tensor | None) -> Teacher:
    """The teacher's tensors as a kernel takes them."""
    operands = problem.operands
    return Teacher(operand(operands.teacher_query), operand(operands.teacher_key), teacher_lse)


def operand(tensor: Tensor | None) -> Operand:
    """A [B, H, L, width] tensor, or none, as a kernel takes it."""
    if tensor is None:
        return Operand(None, 0, 0, 0)
    # Of a single entry any stride is right, and 1 would be a case of its own.
    batch, head, row = (
        0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride()[:3], strict=False)
    )
    return Operand(tensor, batch, head, row)


def mask_of(problem: Problem) -> Mask:
    """The mask, or none, as a kernel takes it."""
    mask, strides = problem.operands.attn_mask, problem.facts.mask_strides
    if mask is None or strides is None:
        return Mask(None, 0, 0, 0, 0)
    return Mask(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *strides)


def noise_of(problem: Problem) -> Noise:
    """What dropout keeps, as a kernel takes it."""
    dropout_p = problem.facts.dropout_p
    if dropout_p == 0.0:
        return Noise(None, 0, 1.0)
    # A word is kept iff it is at least p * 2**32; p just below 1 keeps the highest word alone.
    threshold = min(math.ceil(dropout_p * 2**32), 2**32 - 1)
    signed = threshold - 2**32 if threshold >= 2**31 else threshold
    return Noise(problem.operands.dropout_seed, signed, 1.0 / (1.0 - dropout_p))


def scales_of(problem: Problem) -> Scales:
    """The factors on logits and gradients as a kernel takes them."""
    facts = problem.facts
    return Scales(facts.scale * LOG2E, facts.teacher_scale * LOG2E, facts.scale)


class Arriving(NamedTuple):
    """The gradients that reach a call's results, and what the forward pass left."""

    grad_output: Tensor | None  # [B, H, Lq, Dv]
    grad_kl: Tensor | None  # contiguous float32 [B, H, Lq]
    grad_lse: Tensor | None  # contiguous float32 [B, H, Lq]
    output: Tensor  # [B, H, Lq, Dv]
    teacher_lse: Tensor | None  # contiguous float32 [B, H, Lq]
    row_state: Tensor  # contiguous float32 [3, B, H, Lq]


def backward_launches(
    problem: Problem,
    arriving: Arriving,
    constants: Tensor,  # [3, B, H, Lq] float32, scratch
    grad_query: Tensor | None,  # [B, H, Lq, D], None where it is not wanted
    grad_key: Tensor | None,  # [B, H, Lk, D], None where neither it nor grad_value is wanted
    grad_value: Tensor | None,  # [B, H, Lk, Dv]; there with grad_key if there is a grad_output
) -> list[Launch]:
    """The backward pass of one sweep, kernels in their order."""
    value_dim = 0 if arriving.grad_output is None else problem.facts.value_dim
    divergence = "none" if arriving.grad_kl is None else problem.facts.divergence

    def variant_of(kernel: str) -> tuple[Variant, Tiling]:
        return make_variant(kernel, problem, value_dim=value_dim, divergence=divergence)

    shared = {
        "student": student_of(problem),
        "teacher": teacher_of(problem, None),
        "mask": mask_of(problem),
        "noise": noise_of(problem),
        "grad_output": operand(arriving.grad_output),
        "state": arriving.row_state,
        "constants": constants,
        "scales": scales_of(problem),
        **problem.facts.sizes,
    }
    row_variant, row_tile = variant_of("backward_rows")
    launches = [row_constants_launch(problem, arriving, constants, row_variant, row_tile)]
    if grad_key is not None:
        grads = {"grad_key": operand(grad_key), "grad_value": operand(grad_value)}
        variant, tile = variant_of("backward_keys")
        keys = {**shared, **grads, "V": variant}
        launches.append(
            launch(backward_keys_kernel, problem, tile, "key_length", tile.block_k, keys)
        )
    if grad_query is not None:
        rows = {**shared, "grad_query": operand(grad_query), "V": row_variant}
        launches.append(
            launch(backward_rows_kernel, problem, row_tile, "query_length", row_tile.block_q, rows)
        )
    return launches


def row_constants_launch(
    problem: Problem, arriving: Arriving, constants: Tensor, variant: Variant, tile: Tiling
) -> Launch:
    """What is constant in a row, of a backward pass of that variant."""
    arguments = {
        "output": operand(arriving.output if arriving.grad_output is not None else None),
        "grad_output": operand(arriving.grad_output),
        "grads": RowGradients(arriving.grad_kl, arriving.grad_lse),
        "state": arriving.row_state,
        "teacher_lse": arriving.teacher_lse,
        "constants": constants,
        **problem.facts.sizes,
        "V": variant,
    }
    return launch(row_constants_kernel, problem, tile, "query_length", tile.block_q, arguments)
