"""What a benchmark run has measured, read back from pytest-benchmark's JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_peers import PINNED_SDPA
from bench.rounds import SUBJECT, YARDSTICK


@dataclass(frozen=True)
class Timing:
    """Times of all candidates in one measurement, from interleaved rounds."""

    kind: str  # "time", "grid", "latency", "overhead", "modes", "threads", "split", "training", ...
    shape: str  # or the setting of a whole detector
    pass_name: str
    dtype: str
    sizes: dict[str, Any]
    seconds: dict[str, list[float]]  # candidate -> one time of one call per round it took part in
    errors: dict[str, dict[str, float]]  # candidate -> quantity -> relative error
    threads: int | None = None  # where it is not the run's own number
    refused: dict[str, str] = field(default_factory=dict)  # candidate -> why it did not run

    def median(self, candidate: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[candidate])

    def spread(self, candidate: str) -> float | None:
        """Interquartile range, in seconds; None after a single round."""
        if len(self.seconds[candidate]) < 2:
            return None
        first, _, third = statistics.quantiles(self.seconds[candidate], n=4, method="inclusive")
        return third - first

    def ratio(self, peer: str, candidate: str = SUBJECT) -> float | None:
        """Median of the candidate over that of the peer; None where one of them did not run."""
        if not {peer, candidate} <= self.seconds.keys():
            return None
        return self.median(candidate) / self.median(peer)

    def arithmetic(self, candidate: str) -> float:
        """Seconds of one head's arithmetic, from a call with `sizes["heads"]` heads beside one."""
        heads = self.sizes["heads"]
        difference = self.median(f"{candidate}, {heads} heads") - self.median(candidate)
        return difference / (heads - 1)

    def overhead(self, candidate: str) -> float:
        """Seconds of a call with one head beyond its arithmetic."""
        return self.median(candidate) - self.arithmetic(candidate)


@dataclass(frozen=True)
class Memory:
    """Peak memory of some work, beyond its inputs."""

    kind: str  # "memory" of an attention layer, or "training memory"
    shape: str
    sizes: dict[str, Any]
    peak_bytes: dict[str, list[int]]  # candidate -> one figure per process
    map_bytes: int | None = None  # of one stored float32 map of all heads of the layer
    dtype: str = "float32"

    def median(self, candidate: str) -> float:
        """Bytes."""
        return statistics.median(self.peak_bytes[candidate])

    def beyond_sdpa(self, candidate: str = SUBJECT) -> float | None:
        """Peak memory more than that of `sdpa`, in stored maps; None where one is missing."""
        if self.map_bytes is None or not {candidate, YARDSTICK} <= self.peak_bytes.keys():
            return None
        return (self.median(candidate) - self.median(YARDSTICK)) / self.map_bytes


@dataclass(frozen=True)
class Run:
    """One run of the benchmarks."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    timings: list[Timing]
    memory: list[Memory]

    def of(self, kind: str, dtype: str | None = None) -> list[Timing]:
        """The timings of a kind, and of a dtype if one is given."""
        return [t for t in self.timings if t.kind == kind and dtype in (None, t.dtype)]

    def memory_of(self, kind: str) -> list[Memory]:
        return [memory for memory in self.memory if memory.kind == kind]

    @property
    def device(self) -> str:
        """The kind of device it was measured on: "cpu" or "cuda"."""
        return "cuda" if self.machine.get("gpu") else "cpu"

    @property
    def dtypes(self) -> list[str]:
        """Of the timings of one layer."""
        return list(dict.fromkeys(timing.dtype for timing in self.of("time")))


def candidates_of(timings: Iterable[Timing]) -> list[str]:
    """All candidates that appear, those of most measurements in their own order."""
    return list(dict.fromkeys(name for timing in timings for name in timing.seconds))


def read_run(path: Path) -> Run:
    """Read what ``pytest bench --benchmark-json PATH`` has written.

    Raises:
        ValueError: the file is no such JSON.
    """
    try:
        content = json.loads(path.read_text())
        benchmarks = [benchmark for benchmark in content["benchmarks"] if benchmark["stats"]]
        return Run(
            machine=content["machine_info"],
            commit=content["commit_info"],
            date=content["datetime"],
            timings=[_timing(b) for b in benchmarks if "seconds" in b["extra_info"]],
            memory=[_memory(b["extra_info"]) for b in benchmarks if _is_memory(b["extra_info"])],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by pytest bench --benchmark-json: {error!r}"
        ) from error


def _timing(benchmark: dict[str, Any]) -> Timing:
    info = benchmark["extra_info"]
    times = with_yardstick(info["seconds"])
    first = [name for name in (YARDSTICK, SUBJECT) if name in times]  # in every table
    ordered = [*first, *(name for name in times if name not in first)]
    return Timing(
        kind=info["kind"],
        shape=info["shape"],
        pass_name=info["pass"],
        dtype=info["dtype"],
        sizes=info["sizes"],
        seconds={name: [time / info["calls"] for time in times[name]] for name in ordered},
        errors=info.get("errors", {}),
        threads=info.get("threads"),
        refused=info.get("refused", {}),
    )


def with_yardstick(figures: dict[str, list[float]]) -> dict[str, list[float]]:
    """The figures with those of `YARDSTICK`, where only torch's pinned attentions have any.

    On a GPU torch has several attentions and no single one to be compared with: the best of them,
    by its median in this measurement, is.
    """
    pinned = [figures[name] for name in PINNED_SDPA if name in figures]
    if YARDSTICK in figures or not pinned:
        return figures
    return {YARDSTICK: min(pinned, key=statistics.median), **figures}


def _is_memory(info: dict[str, Any]) -> bool:
    return "peak_bytes" in info


def _memory(info: dict[str, Any]) -> Memory:
    peaks = with_yardstick(info["peak_bytes"])
    layer = (info.get("map_bytes"), info["dtype"])
    return Memory(info["kind"], info["shape"], info["sizes"], peaks, *layer)
