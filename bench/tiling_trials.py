"""Tilings near those that the Triton kernels have, tried one by one in the tables' place."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from attn_kd.kernels.triton.configurations import Tiling
from attn_kd.ops import triton_operator
from attn_kd.ops.arguments import Operands, Options
from bench.devices import Clock
from bench.kernel_calls import KernelCall, entry_replaced, table_of
from bench.kernel_resources import Row, rows_of
from bench.rounds import PeersInTurn, rounds_within
from bench.triton_cubins import compiling_for
from bench.workloads import Workload

RESCALE_ABOVE = 8  # powers of 2, as in FlashAttention-4
TOLERANCE = 1e-2  # relative, of results beside those of the tables' own tiling
WORTHWHILE = 0.98  # of the present time: what is less of a gain is not worth a change
TOO_LARGE = "needs more shared memory than there is"

Results = tuple[Tensor, ...]
Pass = Callable[[], Results]

# The operator's options in the passes that launch a kernel and that it is tuned for.
_PLAIN = {"": Options()}
_MEAN = {"head mean": Options(head_reduction="mean")}
_TWO_PASS = {"js": Options(divergence="js"), **_MEAN}
MODES: dict[str, dict[str, Options]] = {
    "forward": _PLAIN,
    "backward_keys": _PLAIN,
    "backward_rows": _PLAIN,
    "group_slopes": _MEAN,
    "two_pass_forward": _TWO_PASS,
    "two_pass_backward_keys": _TWO_PASS,
    "two_pass_backward_rows": _TWO_PASS,
}


class Entry(NamedTuple):
    """A place in the tables."""

    kernel: str
    width: int
    dtype: torch.dtype

    @property
    def tiling(self) -> Tiling:
        """What stands there."""
        return table_of(self.dtype)[self.kernel, self.width]


@dataclass(frozen=True)
class Trial:
    """A tiling, and what became of it."""

    tiling: Tiling
    seconds: dict[str, list[float]]  # by pass; none of a pass that it was not timed in
    fault: str | None = None  # why it cannot be used

    def ratio(self, present: Trial) -> float:
        """Its time over that of the present tiling: the geometric mean over all passes."""
        logs = [
            math.log(statistics.median(self.seconds[name]) / statistics.median(seconds))
            for name, seconds in present.seconds.items()
        ]
        return math.exp(statistics.fmean(logs))


def written(tile: Tiling) -> str:
    """The tiling as it stands in the tables."""
    facts = [str(number) for number in tile[:4]]
    optional = zip(tile._fields[4:], tile[4:], strict=True)
    facts += [f"{name}={value}" for name, value in optional if value]
    return f"Tiling({', '.join(facts)})"


def near(tile: Tiling, kernel: str) -> list[Tiling]:
    """The tiling, then those one step from it: in sides, in warps, in both, in stages.

    Of the forward pass also that which rescales its sums seldom, if it does so always, or always.
    """
    q, k, warps, stages = tile[:4]
    steps = (
        *((q // 2, k, warps), (2 * q, k, warps), (q, k // 2, warps), (q, 2 * k, warps)),
        *((q // 2, 2 * k, warps), (2 * q, k // 2, warps)),
        *((q // 2, k, warps // 2), (2 * q, k, 2 * warps)),
        *((q, k // 2, warps // 2), (q, 2 * k, 2 * warps)),
        *((q, k, warps // 2), (q, k, 2 * warps)),
        *((q, k, warps, stages - 1), (q, k, warps, stages + 1)),
    )
    others = [Tiling(*step, *tile[len(step) :]) for step in steps]
    if kernel == "forward":
        others.append(tile._replace(rescale_above=0 if tile.rescale_above else RESCALE_ABOVE))
    return [tile, *filter(_is_sensible, others)]


def _is_sensible(tile: Tiling) -> bool:
    sides = (tile.block_q, tile.block_k)
    return (
        min(sides) >= 16  # tl.dot takes no less
        and max(sides) <= 128
        and tile.num_warps in (4, 8)
        and 1 <= tile.num_stages <= 4
    )


def make_pass(kernel: str, options: Options, workload: Workload) -> Pass:
    """The forward or the backward pass that launches a kernel, by the tilings of the moment."""
    operands = Operands(*(tensor.detach() for tensor in workload.inputs))
    output, _, _, _, row_state = triton_operator.forward(*operands, *options)
    if "backward" not in kernel:
        # Not row_state: its origins are those of the tiling.
        return lambda: triton_operator.forward(*operands, *options)[:3]
    averaged = options.head_reduction == "mean"
    grad_kl = workload.grad_kl[:, 0] if averaged else workload.grad_kl
    *tensors, teacher_lse, mask, seed = operands
    forward = (*tensors, mask, seed, output, teacher_lse, row_state, *options)
    return lambda: triton_operator.backward(workload.grad_output, grad_kl, None, *forward)


def try_all(
    entry: Entry, tilings: Sequence[Tiling], passes: Mapping[str, Pass], clock: Clock, budget: float
) -> list[Trial]:
    """Each tiling in every pass, timed in turn for about `budget` seconds a pass.

    One that does not fit the GPU, or whose results are not those of the tables, is not timed on.
    """
    faults: dict[Tiling, str] = {}
    seconds: dict[Tiling, dict[str, list[float]]] = {tile: {} for tile in tilings}
    for name, run in passes.items():
        expected = run()
        functions = {tile: partial(_run_with, entry, tile, run) for tile in tilings}
        for tile in [tile for tile in tilings if tile not in faults]:
            fault = fault_of(functions[tile], expected)
            if fault is not None:
                faults[tile] = fault if fault == TOO_LARGE else f"{name}: {fault}"
        sound = {written(tile): functions[tile] for tile in tilings if tile not in faults}
        times = time_in_turn(sound, clock, budget)
        for tile in tilings:
            seconds[tile][name] = times.get(written(tile), [])
    return [Trial(tile, seconds[tile], faults.get(tile)) for tile in tilings]


def _run_with(entry: Entry, tile: Tiling, run: Pass) -> Results:
    with entry_replaced(*entry, tile):
        return run()


def fault_of(run: Pass, expected: Results) -> str | None:
    """Why the results cannot be used; None if they are the expected ones."""
    try:
        found = run()
    except triton.OutOfResources:
        return TOO_LARGE
    except Exception as error:  # as it comes from the compiler or the driver; the others go on
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        error = ((x - y).double().norm() / y.double().norm()).item()
        if not error <= TOLERANCE:  # or it is NaN
            return f"result {number} is {error:.1e} off"
    return None


def time_in_turn(
    functions: dict[str, Callable[[], object]], clock: Clock, budget: float
) -> dict[str, list[float]]:
    """Seconds of each function in each of some interleaved rounds."""
    if not functions:
        return {}
    one_round = sum(clock.seconds(function) for function in functions.values())
    peers = PeersInTurn(functions, clock=clock)
    for _ in range(rounds_within(budget, one_round)):
        peers()
    peers.finish()
    return peers.seconds


def best(trials: Sequence[Trial]) -> Trial:
    """The fastest; the first, which is the present one, unless another is clearly faster."""
    present, *others = trials
    sound = [trial for trial in others if trial.fault is None]
    fastest = min(sound, key=lambda trial: trial.ratio(present), default=present)
    return fastest if fastest.ratio(present) < WORTHWHILE else present


def compiled_rows(entry: Entry, tile: Tiling, arch: int) -> list[Row]:
    """The kernel with that tiling as compiled for sm_`arch`, one row a mode; none if too large."""
    rows = []
    for mode, options in MODES[entry.kernel].items():
        asked = {"divergence": options.divergence, "head_reduction": options.head_reduction}
        call = KernelCall(entry.width, entry.dtype, **asked)
        title = ", ".join(filter(None, (f"head_dim {entry.width}", mode, written(tile))))
        try:
            with compiling_for(arch) as launches, entry_replaced(*entry, tile):
                call.run()
        except triton.OutOfResources:
            continue
        compiled = rows_of(launches, title, call.tuned)
        rows += [row for row in compiled if row.kernel == f"{entry.kernel}_kernel"]
    return rows
