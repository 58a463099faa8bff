"""Turn a benchmark run's JSON into tables, as markdown on stdout, and into figures.

``python -m bench.summary bench/results.json [--figures docs/images]``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench import model_tables, operator_tables
from bench.measurements import SUBJECT, Memory, Run, Timing, read_run
from bench.tables import Table, markdown, verdict
from bench.targets import (
    EXTRA_MEMORY,
    EXTRA_MEMORY_SHAPE,
    GOALS,
    OVERHEAD,
    OVERHEAD_PASSES,
    Goal,
)

Measurement = TypeVar("Measurement")

TIME_NOTE = (
    "Milliseconds: median ± half the interquartile range of interleaved rounds; slow peers take "
    "part in every third round. `sdpa` and `attn_kd.attention` compute attention alone; the others "
    "also the divergence."
)
LATENCY_NOTE = (
    'Microseconds a call; "recorded" is a forward that a backward may follow. Overhead, below, is '
    "what of a call of B = H = 1, Lq = Lk = 16 is not arithmetic, on one thread: the arithmetic of "
    "one head is a sixteenth of what 16 more heads in the same call add."
)
GPU_TIME_NOTE = (
    "Milliseconds between two CUDA events, the call queued as a whole before it begins, caches not "
    "flushed: median ± half the interquartile range of interleaved rounds. `sdpa` is the fastest "
    "of torch's pinned attentions in that line; it and `attn_kd.attention` compute attention "
    "alone; the others also the divergence."
)
GRAPH_NOTE = "Microseconds a replay of a CUDA graph of one call: no Python, no launches."
TRAINING_NOTE = (
    "Milliseconds a step of a DETR-1/1 with a frozen backbone: without distillation, with the "
    "teacher running and its attention unused, distilled by the fused operator, distilled by "
    "stored maps."
)
TEACHER_CACHE_NOTE = (
    "Milliseconds a step of a DETR-1/1, images loaded and prepared in it: with the teacher running "
    "and with its records read from disk, query and key in float16. A frozen backbone runs once "
    "for both models where the teacher runs. The divergence is compared with the running teacher's."
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.summary", description=__doc__)
    parser.add_argument("results", type=Path, help="what --benchmark-json has written")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also draw the figures there, as PNG"
    )
    args = parser.parse_args(argv)
    try:
        run = read_run(args.results)
    except (OSError, ValueError) as error:
        print(f"bench.summary: error: {error}", file=sys.stderr)
        return 2
    print(summary(run))
    if args.figures:
        from bench.figures import draw_all  # matplotlib only where it is wanted

        for path in draw_all(run, args.figures):
            print(f"drawn: {path}", file=sys.stderr)
    return 0


def summary(run: Run) -> str:
    """All tables of a run, with headings; those of what was not measured are left out."""
    parts = [machine_line(run), *_goals(run)]
    time_note = TIME_NOTE if run.device == "cpu" else GPU_TIME_NOTE
    for dtype in run.dtypes:
        timings = run.of("time", dtype)
        parts += _section(f"Time, {dtype}", operator_tables.time_table, timings, time_note)
        parts += _section(f"Ratios, {dtype}", operator_tables.ratio_table, timings)
        refusing = [timing for timing in timings if timing.refused]
        parts += _section(f"Did not run, {dtype}", operator_tables.refusal_table, refusing)
    both = "forward+backward"
    for title, build, kind, note in (
        (f"Time against tokens, {both}", operator_tables.time_table, "grid", ""),
        ("Calls", operator_tables.latency_table, "latency", LATENCY_NOTE),
        ("Replayed calls", operator_tables.latency_table, "graph", GRAPH_NOTE),
        ("Overhead of a call", operator_tables.overhead_table, "overhead", ""),
        ("Modes", operator_tables.modes_table, "modes", ""),
        (f"Threads, {both}", operator_tables.threads_table, "threads", ""),
        ("Equal work in 64 heads and in one", operator_tables.split_table, "split", ""),
    ):
        timings = run.of(kind)
        parts += _section(_with_dtype(title, timings), build, timings, note)
    for title, build, kind, note in (
        ("Training steps", model_tables.training_table, "training", TRAINING_NOTE),
        ("Teacher cache", model_tables.teacher_cache_table, "teacher cache", TEACHER_CACHE_NOTE),
        ("Inference, one image", model_tables.inference_table, "inference", ""),
    ):
        parts += _section(title, build, run.of(kind), note)
    layers, steps = run.memory_of("memory"), run.memory_of("training memory")
    title = _with_dtype(f"Peak memory, MiB, {both}", layers)
    parts += _section(title, operator_tables.memory_table, layers)
    title = "Peak memory of a training step, MiB"
    parts += _section(title, model_tables.training_memory_table, steps)
    return "\n\n".join([*parts, *_errors(run)])


def _with_dtype(title: str, measurements: Sequence[Timing | Memory]) -> str:
    """The title with the dtype that all of them have."""
    return ", ".join([title, *dict.fromkeys(each.dtype for each in measurements)])


def machine_line(run: Run) -> str:
    """Where, when and with what it was measured."""
    machine, torch, attn_kd = run.machine, run.machine["torch"], run.machine["attn_kd"]
    gpu = "".join(f"{part}; " for part in _gpu_parts(machine))
    commit = run.commit.get("id", "unknown")[:10] + (
        " + changes" if run.commit.get("dirty") else ""
    )
    threads = f"{torch['threads']} thread" + "s" * (torch["threads"] > 1)
    return (
        f"{gpu}{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['cpus']} CPUs, "
        f"{threads}, {machine['system']}; torch {torch['version']} "
        f"({torch['capability']}), attn_kd {attn_kd['version']} "
        f"({attn_kd['instruction_set'] or 'reference backend only'}), commit {commit}, "
        f"Python {machine['python_version']}, {run.date[:16].replace('T', ' ')} UTC"
    )


def _gpu_parts(machine: dict[str, Any]) -> list[str]:
    gpu = machine.get("gpu")
    if not gpu:
        return []
    versions = (
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}, "
        f"Triton {machine['triton']}"
    )
    return [f"{gpu['name']} ({gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB)", versions]


def goal_table(run: Run) -> Table:
    """Every goal of which the run has a measurement, met or missed."""
    rows = [["what", "shape", "pass", "dtype", "measured", "first bar", "goal"]]
    for goal in (goal for goal in GOALS if goal.device == run.device):
        found = [ratio for timing in run.timings if (ratio := _measured(goal, timing)) is not None]
        for value in found:
            first = "" if goal.first is None else verdict(value, goal.first, f"{goal.first:.2f}")
            what = [f"{goal.candidate} / {goal.peer}", goal.shape, goal.pass_name, goal.dtype]
            last = verdict(value, goal.limit, f"{goal.limit:.2f}")
            rows.append([*what, f"{value:.3f}", first, last])
    for timing in run.of("overhead"):
        if timing.pass_name in OVERHEAD_PASSES and run.device == "cpu":
            value = timing.overhead(SUBJECT)
            what = ["overhead of a call", timing.shape, timing.pass_name, timing.dtype]
            last = verdict(value, OVERHEAD, f"{1e6 * OVERHEAD:.0f} µs")
            rows.append([*what, f"{1e6 * value:.1f} µs", "", last])
    for memory in run.memory_of("memory"):
        beyond = memory.beyond_sdpa()
        if memory.shape == EXTRA_MEMORY_SHAPE and beyond is not None:
            what = ["memory beyond sdpa / one map", memory.shape, "forward+backward", memory.dtype]
            last = verdict(beyond, EXTRA_MEMORY, f"{EXTRA_MEMORY:.0%}")
            rows.append([*what, f"{beyond:+.1%}", "", last])
    return rows


def _measured(goal: Goal, timing: Timing) -> float | None:
    place = (timing.kind, timing.dtype, timing.pass_name, timing.shape)
    if place != (goal.kind, goal.dtype, goal.pass_name, goal.shape):
        return None
    return timing.ratio(goal.peer, goal.candidate)


def _goals(run: Run) -> list[str]:
    table = goal_table(run)
    met = sum(row[-1].endswith("met") for row in table[1:])
    if len(table) == 1:
        return []
    return [f"### Goals: {met} of {len(table) - 1} met", markdown(table)]


def _errors(run: Run) -> list[str]:
    title = "Largest relative error against float64"
    parts = []
    for dtype in run.dtypes:
        timings = run.of("time", dtype) + run.of("grid", dtype)
        parts += _section(f"{title}, {dtype}", operator_tables.error_table, timings)
    models = run.of("training") + run.of("inference")
    return parts + _section(f"{title}, whole detectors", operator_tables.error_table, models)


def _section(
    title: str,
    build: Callable[[list[Measurement]], Table],
    measurements: list[Measurement],
    note: str = "",
) -> list[str]:
    if not measurements:
        return []
    return [f"### {title}", markdown(build(measurements)), *([note] if note else [])]


if __name__ == "__main__":
    sys.exit(main())
