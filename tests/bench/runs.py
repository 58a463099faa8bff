"""Measurements made up for tests of what is said about them."""

from __future__ import annotations

from typing import Any

from bench.measurements import Memory, Run, Timing

SIZES = {"B": 2, "H": 8, "Lq": 1064, "Lk": 1064, "D": 32}


def timing(seconds: dict[str, list[float]], **fields: Any) -> Timing:
    """Of coco, forward and backward, float32, unless fields say otherwise."""
    given = {
        "kind": "time",
        "shape": "coco",
        "pass_name": "forward+backward",
        "dtype": "float32",
        "sizes": SIZES,
        "errors": {},
    }
    return Timing(**{**given, **fields}, seconds=seconds)


def run_of(*timings: Timing, memory: tuple[Memory, ...] = (), device: str = "cpu") -> Run:
    """A run on a machine nobody knows."""
    machine = {"gpu": {"name": "nobody's"}} if device == "cuda" else {}
    return Run(machine=machine, commit={}, date="", timings=list(timings), memory=list(memory))
