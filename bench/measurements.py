"""What a benchmark run has measured, read back from pytest-benchmark's JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUBJECT = "attn_kd"  # the candidate that pytest-benchmark times itself; see rounds.py


@dataclass(frozen=True)
class Timing:
    """Times of all candidates on one shape, pass and dtype, from interleaved rounds."""

    shape: str
    pass_name: str
    dtype: str
    sizes: dict[str, int]
    seconds: dict[str, list[float]]  # candidate -> one time per round
    errors: dict[str, dict[str, float]]  # candidate -> quantity -> relative error
    threads: int | None = None  # where it is not the run's own number

    @property
    def key(self) -> tuple[str, str, str]:
        """As in targets.py."""
        return self.dtype, self.pass_name, self.shape

    def median(self, candidate: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[candidate])

    def spread(self, candidate: str) -> float:
        """Interquartile range, in seconds."""
        first, _, third = statistics.quantiles(self.seconds[candidate], n=4, method="inclusive")
        return third - first

    def ratio(self, peer: str, candidate: str = SUBJECT) -> float | None:
        """Median of the candidate over that of the peer; None where the peer did not run."""
        if not {peer, candidate} <= self.seconds.keys():
            return None
        return self.median(candidate) / self.median(peer)


@dataclass(frozen=True)
class Memory:
    """Peak memory of forward and backward, beyond the inputs."""

    shape: str
    sizes: dict[str, int]
    peak_bytes: dict[str, list[int]]  # candidate -> one figure per process
    map_bytes: int  # of one stored map of all heads

    def median(self, candidate: str) -> float:
        """Bytes."""
        return statistics.median(self.peak_bytes[candidate])


@dataclass(frozen=True)
class Run:
    """One run of the benchmarks."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    timings: list[Timing]
    memory: list[Memory]
    threads: list[Timing]

    def of_dtype(self, dtype: str) -> list[Timing]:
        return [timing for timing in self.timings if timing.dtype == dtype]

    @property
    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(timing.dtype for timing in self.timings))


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
            timings=[_timing(b) for b in _of_kind(benchmarks, "time")],
            memory=[_memory(b["extra_info"]) for b in _of_kind(benchmarks, "memory")],
            threads=[_timing(b) for b in _of_kind(benchmarks, "threads")],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by pytest bench --benchmark-json: {error!r}"
        ) from error


def _of_kind(benchmarks: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [benchmark for benchmark in benchmarks if benchmark["extra_info"]["kind"] == kind]


def _timing(benchmark: dict[str, Any]) -> Timing:
    info = benchmark["extra_info"]
    peers = dict(info["peers"])
    # sdpa, the yardstick, comes first in every table; then attn_kd.
    seconds = {"sdpa": peers.pop("sdpa"), SUBJECT: benchmark["stats"]["data"], **peers}
    return Timing(
        shape=info["shape"],
        pass_name=info["pass"],
        dtype=info["dtype"],
        sizes=info["sizes"],
        seconds=seconds,
        errors=info.get("errors", {}),
        threads=info.get("threads"),
    )


def _memory(info: dict[str, Any]) -> Memory:
    return Memory(info["shape"], info["sizes"], info["peak_bytes"], info["map_bytes"])
