"""On what the benchmarks run, and the clock that goes with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from attn_kd._nvidia import driver_version

Function = Callable[[], Any]
# Of a GPU, some 0.5 ms: what lies in its queue when the timing begins, so that a call is in the
# queue as a whole before any of it runs, and the gaps between launches are not part of its time.
HEAD_START_CYCLES = 1_000_000
LONGEST_HEAD_START = 64 * HEAD_START_CYCLES


class Clock(Protocol):
    """Says how many seconds a call took."""

    def seconds(self, function: Function) -> float: ...


class WallClock:
    """Time on the wall, of work that is done when the call returns."""

    def seconds(self, function: Function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


class SynchronizedClock:
    """Time on the wall until a GPU has done all that was asked of it: launches count."""

    def seconds(self, function: Function) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start


class EventClock:
    """Time on the GPU, between two CUDA events; caches are as the work before left them.

    A call that the GPU began before all of it was queued is timed again with twice the head start,
    which later calls get too. Gaps count only in one that even the longest does not cover: it takes
    the host longer, waits for the GPU, or has more launches than a queue takes.
    """

    def __init__(self) -> None:
        self.head_start = HEAD_START_CYCLES

    def seconds(self, function: Function) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.head_start)
            start.record()
            function()
            end.record()
            queued_as_a_whole = not start.query()
            end.synchronize()
            if queued_as_a_whole or self.head_start >= LONGEST_HEAD_START:
                return 1e-3 * start.elapsed_time(end)
            self.head_start *= 2


def default_device() -> torch.device:
    """A GPU where torch finds one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock_for(device: torch.device, *, calls: int = 1) -> Clock:
    """The clock for single calls, or for many in a row where it is the calling that is timed."""
    if device.type == "cpu":
        return WallClock()
    return EventClock() if calls == 1 else SynchronizedClock()


def describe_gpu(device: torch.device) -> dict[str, Any] | None:
    """What a reader must know of the GPU and its software; None for a CPU."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver_version(),
    }
