"""Turn a benchmark run's JSON into the tables of the README, as markdown on stdout.

``python -m bench.summary bench/results.json [--figure docs/images/benchmark.png]``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measurements import SUBJECT, Memory, Run, Timing, candidates_of, read_run
from bench.targets import AGAINST_EAGER, AGAINST_SDPA, EXTRA_MEMORY, Target

MIB = 2**20
Table = list[list[str]]  # the first row is the head


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.summary", description=__doc__)
    parser.add_argument("results", type=Path, help="what --benchmark-json has written")
    parser.add_argument("--figure", type=Path, help="also draw the ratios, as PNG or SVG")
    args = parser.parse_args(argv)
    try:
        run = read_run(args.results)
    except (OSError, ValueError) as error:
        print(f"bench.summary: error: {error}", file=sys.stderr)
        return 2
    print(summary(run))
    if args.figure:
        from bench.figure import draw_ratios  # matplotlib only where it is wanted

        draw_ratios(run, args.figure)
    return 0


def summary(run: Run) -> str:
    """All tables of a run, with headings."""
    parts = [machine_line(run)]
    for dtype in run.dtypes:
        timings = run.of_dtype(dtype)
        parts += [f"### Time, {dtype}", markdown(time_table(timings)), TIME_NOTE]
        parts += [f"### Ratios, {dtype}", markdown(ratio_table(timings))]
    if run.threads:
        parts += ["### Threads, forward+backward, float32", markdown(threads_table(run.threads))]
    if run.memory:
        parts += ["### Peak memory, forward+backward, float32"]
        parts += [markdown(memory_table(memory)) for memory in run.memory]
    for dtype in run.dtypes:
        parts += [f"### Largest relative error against float64, {dtype}"]
        parts += [markdown(error_table(run.of_dtype(dtype)))]
    return "\n\n".join(parts)


TIME_NOTE = (
    "Milliseconds: median ± half the interquartile range of interleaved rounds. `sdpa` and "
    "`attn_kd.attention` compute attention alone; the others also the divergence."
)


def machine_line(run: Run) -> str:
    """Where, when and with what it was measured."""
    machine, torch, attn_kd = run.machine, run.machine["torch"], run.machine["attn_kd"]
    commit = run.commit.get("id", "unknown")[:10] + (
        " + changes" if run.commit.get("dirty") else ""
    )
    threads = f"{torch['threads']} thread" + "s" * (torch["threads"] > 1)
    return (
        f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['cpus']} CPUs, "
        f"{threads}, {machine['system']}; torch {torch['version']} "
        f"({torch['capability']}), attn_kd {attn_kd['version']} "
        f"({attn_kd['instruction_set'] or 'reference backend only'}), commit {commit}, "
        f"Python {machine['python_version']}, {run.date[:16].replace('T', ' ')} UTC"
    )


def time_table(timings: list[Timing]) -> Table:
    """Median and spread of each candidate, in milliseconds."""
    candidates = candidates_of(timings)
    rows = [["shape", "pass", "rounds", *(f"`{name}`" for name in candidates)]]
    for timing in timings:
        cells = [_milliseconds(timing, name) for name in candidates]
        rounds = str(len(timing.seconds[SUBJECT]))
        rows.append([_shape(timing), timing.pass_name, rounds, *cells])
    return rows


def ratio_table(timings: list[Timing]) -> Table:
    """attn_kd over each peer, with the targets."""
    head = ["shape", "pass", "attn_kd / sdpa", "first bar", "goal"]
    head += ["attn_kd / eager", "first bar", "goal"]
    others = [p for p in ("sdpa_identity", "compiled") if p in candidates_of(timings)]
    rows = [head + [f"attn_kd / {peer}" for peer in others]]
    for timing in timings:
        row = [timing.shape, timing.pass_name]
        for peer, targets in (("sdpa", AGAINST_SDPA), ("eager", AGAINST_EAGER)):
            ratio = timing.ratio(peer)
            row += [_ratio(ratio), *_verdicts(ratio, targets.get(timing.key))]
        rows.append(row + [_ratio(timing.ratio(peer)) for peer in others])
    return rows


def threads_table(timings: list[Timing]) -> Table:
    """Times per number of threads and, where one thread was measured, how much faster than it."""
    single = {timing.shape: timing for timing in timings if timing.threads == 1}
    rows = [["shape", "threads", "`sdpa`", "speed-up", "`attn_kd`", "speed-up", "attn_kd / sdpa"]]
    for timing in timings:
        row = [timing.shape, str(timing.threads)]
        for name in ("sdpa", SUBJECT):
            base = single.get(timing.shape)
            speed_up = f"{base.median(name) / timing.median(name):.2f}" if base else ""
            row += [_milliseconds(timing, name), speed_up]
        rows.append([*row, _ratio(timing.ratio("sdpa"))])
    return rows


def memory_table(memory: Memory) -> Table:
    """Peak memory of each candidate, and in units of one stored map."""
    one_map = f"of one map ({memory.map_bytes / 1e6:.0f} MB)"
    rows = [["shape", "candidate", "peak, MiB", one_map, "beyond sdpa", "target"]]
    for name in memory.peak_bytes:
        peak = memory.median(name)
        beyond = (peak - memory.median("sdpa")) / memory.map_bytes
        target = _verdict(beyond, EXTRA_MEMORY, f"{EXTRA_MEMORY:.0%}") if name == SUBJECT else ""
        cells = [f"{peak / MIB:.1f}", f"{peak / memory.map_bytes:.3f}"]
        rows.append([memory.shape, f"`{name}`", *cells, f"{beyond:+.1%} of a map", target])
    return rows


def error_table(timings: list[Timing]) -> Table:
    """The largest relative error of each candidate over all shapes, per quantity."""
    worst: dict[str, dict[str, float]] = {}
    for timing in timings:
        for name, errors in timing.errors.items():
            largest = worst.setdefault(name, {})
            for quantity, error in errors.items():
                largest[quantity] = max(error, largest.get(quantity, 0.0))
    quantities = list(dict.fromkeys(q for errors in worst.values() for q in errors))
    quantities.sort(key=["output", "kl", "grad_query", "grad_key", "grad_value"].index)
    rows = [["candidate", *quantities]]
    for name, errors in worst.items():
        rows.append([f"`{name}`", *(f"{errors[q]:.1e}" if q in errors else "" for q in quantities)])
    return rows


def markdown(table: Table) -> str:
    """The table with its columns aligned, so that it also reads as plain text."""
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _shape(timing: Timing) -> str:
    sizes = timing.sizes
    return f"{timing.shape} ({', '.join(str(sizes[n]) for n in ('B', 'H', 'Lq', 'Lk', 'D'))})"


def _milliseconds(timing: Timing, candidate: str) -> str:
    if candidate not in timing.seconds:
        return ""
    median, spread = 1e3 * timing.median(candidate), 1e3 * timing.spread(candidate) / 2
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} ± {spread:.{digits}f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _verdicts(ratio: float | None, target: Target | None) -> list[str]:
    if ratio is None or target is None:
        return ["", ""]
    return [_verdict(ratio, limit, f"{limit:.2f}") for limit in target]


def _verdict(value: float, limit: float, written: str) -> str:
    return f"≤ {written} {'met' if value <= limit else 'missed'}"


if __name__ == "__main__":
    sys.exit(main())
