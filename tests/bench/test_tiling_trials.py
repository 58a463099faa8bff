"""Tilings are tried in the tables' place, and judged by results and times."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from attn_kd.kernels.triton.configurations import KERNELS, Tiling
from bench.devices import default_device
from bench.kernel_calls import HEADS, tile_of
from bench.rounds import MIN_ROUNDS
from bench.tiling_trials import (
    MODES,
    RESCALE_ABOVE,
    TOO_LARGE,
    Entry,
    Trial,
    best,
    near,
    time_in_turn,
    try_all,
)
from bench.tune_triton import passes_of
from bench.workloads import Shape

DEVICE = default_device()
ENTRY = Entry("forward", 32, torch.bfloat16)
# As `tiling` makes all of them for a forward pass on sm_90: with the last tile apart.
FIRST, SECOND, THIRD = (
    Tiling(*sizes, num_warps=4, num_stages=2, last_apart=True)
    for sizes in ((64, 32), (32, 32), (32, 64))
)


class StoppedClock:
    """For what has been run to see its results, and need not be run again."""

    def seconds(self, function) -> float:
        return 1.0


class CountingClock:
    """Each call takes a second more than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def seconds(self, function) -> float:
        function()
        self.calls += 1
        return float(self.calls)


def trial(tiling: Tiling, *seconds: float, fault: str | None = None) -> Trial:
    """One median a pass."""
    return Trial(tiling, {f"pass {n}": [second] for n, second in enumerate(seconds)}, fault)


def in_force() -> Tiling:
    """What the tables say of ENTRY."""
    return tile_of(ENTRY.kernel, ENTRY.width, ENTRY.dtype, 90, HEADS)


def test_near_tilings_are_one_step_from_the_first():
    tile = Tiling(64, 32, 4, 2)
    first, *others = near(tile, "backward_rows")
    assert first == tile and len({first, *others}) == 1 + len(others)
    assert {Tiling(128, 32, 8, 2), Tiling(32, 64, 4, 2), Tiling(64, 32, 4, 3)} <= set(others)
    assert all(other.num_stages == 2 or other[:3] == tile[:3] for other in others)


def test_near_tilings_have_sides_that_the_kernels_take():
    for tile in near(Tiling(16, 128, 4, 1), "forward"):
        assert min(tile[:2]) >= 16 and max(tile[:2]) <= 128 and tile.num_stages > 0


@pytest.mark.parametrize("present, other", [(0, RESCALE_ABOVE), (RESCALE_ABOVE, 0)])
def test_of_the_forward_pass_the_other_rescaling_is_near(present, other):
    tile = FIRST._replace(rescale_above=present)
    assert tile._replace(rescale_above=other) in near(tile, "forward")
    assert {tiling.rescale_above for tiling in near(tile, "backward_keys")} == {present}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_computes_the_same_by_another_tiling(kernel):
    entry = Entry(kernel, 32, torch.bfloat16)
    passes = passes_of(entry, {"small": Shape(B=1, H=2, Lq=40, Lk=50, D=32)}, DEVICE)
    assert len(passes) == len(MODES[kernel])
    found = try_all(entry, [FIRST, SECOND], passes, StoppedClock(), budget=0.0)
    assert [trial.fault for trial in found] == [None, None]


def test_each_tiling_is_in_the_tables_while_it_is_tried_and_not_afterwards():
    before, seen = in_force(), []

    def run() -> tuple[torch.Tensor]:
        seen.append(in_force())
        return (torch.ones(1),)

    try_all(ENTRY, [FIRST, SECOND], {"": run}, CountingClock(), budget=0.0)
    assert set(seen) == {before, FIRST, SECOND} and in_force() == before


def test_wrong_results_and_tilings_that_do_not_fit_are_not_timed():
    def run() -> tuple[torch.Tensor]:
        if in_force() == THIRD:
            raise triton.OutOfResources(200, 100, "shared memory")
        return (torch.full((2,), float("nan") if in_force() == SECOND else 1.0),)

    tilings = [FIRST, SECOND, THIRD]
    found = try_all(ENTRY, tilings, {"a": run, "b": run}, CountingClock(), budget=0.0)
    assert [trial.fault for trial in found] == [None, "a: result 0 is nan off", TOO_LARGE]
    assert [bool(trial.seconds["b"]) for trial in found] == [True, False, False]


def test_a_tiling_that_does_not_compile_keeps_no_other_from_being_tried():
    def run() -> tuple[torch.Tensor]:
        if in_force() == SECOND:
            raise RuntimeError("PassManager::run failed")
        return (torch.ones(1),)

    tilings = [FIRST, SECOND, THIRD]
    found = try_all(ENTRY, tilings, {"a": run}, CountingClock(), budget=0.0)
    assert [trial.fault for trial in found] == [
        None,
        "a: RuntimeError: PassManager::run failed",
        None,
    ]


def test_a_failure_of_the_present_tiling_is_raised():
    def run() -> tuple[torch.Tensor]:
        raise RuntimeError("no GPU")

    with pytest.raises(RuntimeError, match="no GPU"):
        try_all(ENTRY, [FIRST], {"": run}, CountingClock(), budget=0.0)


def test_rounds_are_interleaved():
    order: list[str] = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    times = time_in_turn(functions, CountingClock(), budget=0.0)
    rounds = [order[n : n + 2] for n in range(0, len(order), 2)]
    assert all(sorted(names) == ["a", "b"] for names in rounds)
    assert {len(seconds) for seconds in times.values()} == {MIN_ROUNDS}


@pytest.mark.parametrize(
    ("other", "chosen"),
    [
        (trial(SECOND, 1.0, 1.0), SECOND),
        (trial(SECOND, 0.5, 8.0), FIRST),  # geometric mean: as fast in all
        (trial(SECOND, 2.0, 1.97), FIRST),  # hardly faster
        (trial(SECOND, 1.0, fault="off"), FIRST),
    ],
    ids=["faster", "by turns", "hardly", "faulty"],
)
def test_the_fastest_by_all_passes_is_best(other, chosen):
    assert best([trial(FIRST, 2.0, 2.0), other]).tiling == chosen
