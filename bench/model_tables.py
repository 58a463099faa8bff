"""Tables of whole detectors: training steps and inference."""

from __future__ import annotations

from bench.measurements import SUBJECT, Memory, Timing
from bench.tables import Table, code, mebibytes, milliseconds, ratio

WAYS = ("none", "teacher", "attn_kd", "eager")
CACHED = "teacher cache"
IMPLEMENTATIONS = ("sdpa", "attn_kd", "eager")


def training_table(timings: list[Timing]) -> Table:
    """Milliseconds a step, and what the divergence adds to a step in which the teacher runs."""
    added = ["divergence adds: attn_kd", "eager", "attn_kd / eager"]
    rows = [["setting", "batch", *code(list(WAYS)), *added]]
    for timing in timings:
        times = [milliseconds(timing, way) for way in WAYS]
        extra = [
            f"{timing.median(way) / timing.median('teacher') - 1:+.1%}"
            for way in ("attn_kd", "eager")
        ]
        row = [timing.shape, str(timing.sizes["batch"]), *times, *extra]
        rows.append([*row, ratio(timing.ratio("eager"))])
    return rows


def training_memory_table(memories: list[Memory]) -> Table:
    """Peak memory of a step in MiB, beyond weights, gradients and the optimizer's state."""
    rows = [["setting", "batch", *code(list(WAYS))]]
    for memory in memories:
        peaks = [mebibytes(memory.median(way)) for way in WAYS]
        rows.append([memory.shape, str(memory.sizes["batch"]), *peaks])
    return rows


def teacher_cache_table(timings: list[Timing]) -> Table:
    """Milliseconds a step with the teacher running and with its cache, and bytes on disk."""
    step = ["`attn_kd`", f"`{CACHED}`", "cache / teacher", "divergence off by"]
    rows = [["setting", "batch", "way", *step, "kB a layer and image", "float32 maps, kB"]]
    for timing in timings:
        times = [milliseconds(timing, name) for name in (SUBJECT, CACHED)]
        off = timing.errors[CACHED]["attention_kl"]
        kept = [f"{timing.sizes[name] / 1e3:.1f}" for name in ("layer_bytes", "map_bytes")]
        row = [timing.shape, str(timing.sizes["batch"]), timing.pass_name, *times]
        rows.append([*row, ratio(timing.ratio(SUBJECT, CACHED)), f"{off:.1e}", *kept])
    return rows


def inference_table(timings: list[Timing]) -> Table:
    """Milliseconds an image, images per second, and attn_kd against the others."""
    per_second = [f"{name}, images/s" for name in IMPLEMENTATIONS]
    head = [f"`{name}`, ms" for name in IMPLEMENTATIONS] + per_second
    rows = [["setting", *head, "attn_kd / sdpa"]]
    for timing in timings:
        times = [milliseconds(timing, name) for name in IMPLEMENTATIONS]
        rates = [f"{1 / timing.median(name):.1f}" for name in IMPLEMENTATIONS]
        rows.append([timing.shape, *times, *rates, ratio(timing.ratio("sdpa"))])
    return rows
