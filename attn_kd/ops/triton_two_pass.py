"""Launches of the divergences that need the maps themselves: js, mse, and averages over heads.

Of single heads every kernel has the whole problem. Averaged maps are taken in regions, one after
the other: one kernel fills a scratch with a region's slopes, the others read them from there
(attn_kd/kernels/triton/group_maps.py). Importing this module imports Triton.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_kd.kernels.triton.configurations import Tiling
from attn_kd.kernels.triton.group_maps import group_slopes_kernel
from attn_kd.kernels.triton.two_pass_backward import (
    two_pass_backward_keys_kernel,
    two_pass_backward_rows_kernel,
)
from attn_kd.kernels.triton.two_pass_forward import two_pass_forward_kernel
from attn_kd.kernels.triton.variant import Variant
from attn_kd.ops.triton_launch import (
    Arguments,
    Arriving,
    Launch,
    compiler_options,
    forward_launch,
    make_variant,
    mask_of,
    noise_of,
    operand,
    scales_of,
    student_of,
    teacher_of,
)
from attn_kd.ops.triton_problem import Problem, writable

# Slopes of averaged maps that are stored at a time: 8 MiB of float32, a fifth of the L2 cache of an
# A100, and 1.5 % of one stored map of 8 heads and 4200 tokens. A square region of so many gives 8
# heads 184 programs of 64 rows or keys each.
REGION_ELEMENTS = 2 * 1024**2


class Region(NamedTuple):
    """Queries and keys of some batch entries' maps."""

    batch: int
    entries: int
    query: int
    queries: int
    key: int
    keys: int

    def arguments(self, scratch: Tensor | None) -> Arguments:
        """What tells a kernel its region, and where [entries, rows, columns] of slopes are."""
        bounds = {name: size for name, size in self._asdict().items() if name != "entries"}
        strides = (0, 0) if scratch is None else (scratch.stride(1), scratch.stride(0))
        return {"slopes": scratch, "row_stride": strides[0], "entry_stride": strides[1], **bounds}


class Kernel(NamedTuple):
    """A kernel, what it is compiled for, and the arguments that no region changes."""

    function: Any
    variant: Variant
    tile: Tiling
    arguments: Arguments

    def run(self, programs: int, arguments: Arguments) -> None:
        """Launch it."""
        arguments = {**self.arguments, **arguments, "V": self.variant}
        Launch(self.function, programs, arguments, compiler_options(self.tile)).run()


def two_pass_forward(
    problem: Problem,
    output: Tensor,  # [B, H, Lq, Dv]
    kl: Tensor,  # [B, H, Lq], of averaged maps [B, Lq]
    lse: Tensor,  # [B, H, Lq]
    own_teacher_lse: Tensor,  # [B, Ht, Lq], empty where it was given
    row_state: Tensor,  # [3, B, H, Lq]
) -> None:
    """Fill in the results of a forward pass."""
    teacher_lse, lse_rest = _first_pass(problem, output, lse, own_teacher_lse, row_state)
    arguments = _shared(problem, teacher_lse, row_state)
    rows = _head_kernel("two_pass_forward", problem, arguments, value_dim=0)
    rows.arguments.update(teacher_lse_rest=lse_rest, kl=kl)
    if not problem.facts.average_heads:
        region, no_parts = _whole(problem), {"kl_parts": None, "part_count": 0, "part_rows": 0}
        rows.run(_row_blocks(problem, region, rows), {**no_parts, **region.arguments(None)})
        return
    slopes = _slopes_kernel(problem, arguments)
    slopes.arguments["teacher_lse_rest"] = lse_rest
    unit = _unit(slopes, rows)
    regions = regions_of(_whole(problem), unit)
    scratch = _scratch(regions, unit, row_state)
    entries, part_rows, columns = scratch.shape
    part_count = columns // slopes.tile.block_k
    kl_parts = scratch.new_empty(entries, part_count, part_rows)
    parts = {"kl_parts": kl_parts, "part_count": part_count}
    for region in regions:
        _fill(scratch, slopes, region, parts)
        window = region.arguments(scratch)
        rows.run(_row_blocks(problem, region, rows), {**parts, "part_rows": part_rows, **window})


def two_pass_backward(
    problem: Problem,
    arriving: Arriving,
    grad_query: Tensor | None,  # [B, H, Lq, D], None where it is not wanted
    grad_key: Tensor | None,  # [B, H, Lk, D], None where neither it nor grad_value is wanted
    grad_value: Tensor | None,  # [B, H, Lk, Dv]; there with grad_key if there is a grad_output
) -> None:
    """Fill in the gradients."""
    facts, teacher_lse, row_state = problem.facts, arriving.teacher_lse, arriving.row_state
    assert teacher_lse is not None
    if grad_query is None:  # its kernel leaves the offsets of rows to the other
        grad_query = writable(torch.empty_like(problem.operands.query))
    value_dim = 0 if arriving.grad_output is None else facts.value_dim
    arguments = _shared(problem, teacher_lse, row_state)
    rows, keys = (
        _head_kernel(name, problem, arguments, value_dim)
        for name in ("two_pass_backward_rows", "two_pass_backward_keys")
    )
    slopes = _slopes_kernel(problem, arguments)
    slopes.arguments["teacher_lse_rest"] = None
    unit = _unit(slopes, rows, keys)
    regions = regions_of(_whole(problem), unit) if facts.average_heads else [_whole(problem)]
    scratch = _scratch(regions, unit, row_state) if facts.average_heads else None

    # What regions add to is kept in float32.
    grads_of_keys = [grad for grad in (grad_key, grad_value) if grad is not None]
    row_sums = _sums([grad_query], any(region.key for region in regions))
    key_sums = _sums(grads_of_keys, any(region.query for region in regions))
    _add_gradients(rows, keys, problem, arriving, row_sums, key_sums)
    for region in regions:
        window = region.arguments(scratch)
        if scratch is not None:
            _fill(scratch, slopes, region, {"kl_parts": None, "part_count": 0})
        rows.run(_row_blocks(problem, region, rows), window)
        if key_sums:
            keys.run(_key_blocks(problem, region, keys), window)
    for grad, total in zip([grad_query, *grads_of_keys], row_sums + key_sums, strict=True):
        if total is not grad:
            grad.copy_(total)


def _add_gradients(
    rows: Kernel,
    keys: Kernel,
    problem: Problem,
    arriving: Arriving,
    row_sums: list[Tensor],
    key_sums: list[Tensor],
) -> None:
    """Give the kernels of a backward pass what arrives, and what to write."""
    facts = problem.facts
    shared = {
        "noise": noise_of(problem),
        "grad_output": operand(arriving.grad_output),
        "grad_kl": arriving.grad_kl,
        "offsets": torch.empty_like(arriving.row_state[0]),
        "kl_share": 1.0 / facts.sizes["heads"] if facts.average_heads else 1.0,
    }
    rows.arguments.update(
        shared,
        output=operand(arriving.output if arriving.grad_output is not None else None),
        grad_lse=arriving.grad_lse,
        grad_query=operand(row_sums[0]),
    )
    if key_sums:
        keys.arguments.update(
            shared,
            grad_key=operand(key_sums[0]),
            grad_value=operand(key_sums[1] if len(key_sums) > 1 else None),
        )


def _first_pass(
    problem: Problem, output: Tensor, lse: Tensor, own_teacher_lse: Tensor, row_state: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Attention of the student; return the teacher's LSE and, of its own, what rounding dropped."""
    operands, options = problem.operands, problem.options
    one_pass = options._replace(divergence="reverse_kl", head_reduction="none")
    student_alone = problem.changed(one_pass, **_NO_TEACHER)
    if operands.teacher_lse is not None:
        forward_launch(student_alone, output, None, lse, None, None, row_state).run()
        return operands.teacher_lse, None
    rest = torch.empty_like(own_teacher_lse)
    if own_teacher_lse.shape == lse.shape:
        together = problem.changed(one_pass)
        forward_launch(together, output, None, lse, own_teacher_lse, rest, row_state).run()
        return own_teacher_lse, rest
    forward_launch(student_alone, output, None, lse, None, None, row_state).run()
    # The teacher of other heads, as that of a student with its queries and some of its keys.
    _, _, _, teacher_query, teacher_key, _, mask, _ = operands
    assert teacher_query is not None and teacher_key is not None
    some_keys = teacher_key[:, :, :: problem.facts.group]
    alone = problem.changed(
        one_pass._replace(dropout_p=0.0),
        query=teacher_query,
        key=some_keys,
        value=some_keys[..., :0],
        attn_mask=mask if mask is None or mask.dim() < 3 else mask[..., :1, :, :],
    )
    unwanted = torch.empty_like(own_teacher_lse)
    state = own_teacher_lse.new_empty(3, *own_teacher_lse.shape)
    nothing = teacher_query[..., :0]
    forward_launch(alone, nothing, None, unwanted, own_teacher_lse, rest, state).run()
    return own_teacher_lse, rest


_NO_TEACHER = {"teacher_query": None, "teacher_key": None, "teacher_lse": None}


def _head_kernel(name: str, problem: Problem, shared: Arguments, value_dim: int) -> Kernel:
    """A kernel of single heads; those of averaged maps need no teacher, but its slopes."""
    averaged = problem.facts.average_heads
    variant, tile = make_variant(name, problem, value_dim=value_dim, reads_teacher=not averaged)
    return Kernel(_KERNELS[name], variant, tile, dict(shared))


def _slopes_kernel(problem: Problem, shared: Arguments) -> Kernel:
    variant, tile = make_variant("group_slopes", problem, value_dim=0)
    teacher_query = problem.operands.teacher_query
    assert teacher_query is not None
    arguments = {**shared, "teacher_heads": teacher_query.shape[1]}
    return Kernel(group_slopes_kernel, variant, tile, arguments)


_KERNELS = {
    "two_pass_forward": two_pass_forward_kernel,
    "two_pass_backward_rows": two_pass_backward_rows_kernel,
    "two_pass_backward_keys": two_pass_backward_keys_kernel,
}


def _shared(problem: Problem, teacher_lse: Tensor, row_state: Tensor) -> Arguments:
    """The arguments of all kernels of the second pass."""
    return {
        "student": student_of(problem),
        "teacher": teacher_of(problem, teacher_lse),
        "mask": mask_of(problem),
        "state": row_state,
        "scales": scales_of(problem),
        **problem.facts.sizes,
    }


def _whole(problem: Problem) -> Region:
    sizes = problem.facts.sizes
    batch = sizes["batch_heads"] // sizes["heads"]
    return Region(0, batch, 0, sizes["query_length"], 0, sizes["key_length"])


def regions_of(whole: Region, unit: int) -> list[Region]:
    """Split maps into regions of at most about REGION_ELEMENTS that begin at multiples of `unit`.

    Several whole maps if they fit, else parts as square as their sides allow: there is a program
    for every block of either side.
    """
    _, batch, _, queries, _, keys = whole
    # The scratch holds whole tiles, which are most of it where a side is short.
    rows, columns = _round_up(queries, unit), _round_up(keys, unit)
    entries = max(1, min(batch, REGION_ELEMENTS // (rows * columns)))
    key_step = _step(keys, max(math.isqrt(REGION_ELEMENTS), REGION_ELEMENTS // rows), unit)
    query_step = _step(queries, REGION_ELEMENTS // key_step, unit)
    return [
        Region(
            *(b, min(entries, batch - b)),
            *(query, min(query_step, queries - query)),
            *(key, min(key_step, keys - key)),
        )
        for b in range(0, batch, entries)
        for query in range(0, queries, query_step)
        for key in range(0, keys, key_step)
    ]


def _unit(*kernels: Kernel) -> int:
    """What the blocks of all of them divide."""
    return max(max(kernel.tile.block_q, kernel.tile.block_k) for kernel in kernels)


def _step(length: int, most: int, unit: int) -> int:
    """The size of equal parts of a length, at most about `most`, a multiple of the unit."""
    parts = _blocks(length, max(most, unit))
    return _round_up(_blocks(length, parts), unit)


def _scratch(regions: list[Region], unit: int, like: Tensor) -> Tensor:
    """[entries, rows, columns] for the slopes of any of the regions; the first is the largest."""
    largest = regions[0]
    rows, columns = _round_up(largest.queries, unit), _round_up(largest.keys, unit)
    return like.new_empty(largest.entries, rows, columns)


def _sums(grads: list[Tensor], of_several: bool) -> list[Tensor]:
    """What kernels write gradients to: themselves, or where they sum up several parts, float32."""
    if not of_several:
        return grads
    return [
        grad
        if grad.dtype == torch.float32
        else writable(torch.empty_like(grad, dtype=torch.float32))
        for grad in grads
    ]


def _fill(scratch: Tensor, slopes: Kernel, region: Region, parts: Arguments) -> None:
    """Fill the scratch with a region's slopes, beyond its ends as far as other kernels' tiles."""
    _, rows, columns = scratch.shape
    region = region._replace(queries=rows, keys=columns)
    tiles = (rows // slopes.tile.block_q) * (columns // slopes.tile.block_k)
    slopes.run(region.entries * tiles, {**parts, **region.arguments(scratch)})


def _row_blocks(problem: Problem, region: Region, kernel: Kernel) -> int:
    return (
        region.entries * problem.facts.sizes["heads"] * _blocks(region.queries, kernel.tile.block_q)
    )


def _key_blocks(problem: Problem, region: Region, kernel: Kernel) -> int:
    blocks = _blocks(region.keys, kernel.tile.block_k)
    return region.entries * problem.facts.sizes["heads"] * blocks


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _round_up(size: int, unit: int) -> int:
    return _blocks(size, unit) * unit
