"""Tables of single attention layers: time, ratios, calls, modes, threads, memory, errors."""

from __future__ import annotations

from bench.measurements import SUBJECT, Memory, Timing, candidates_of
from bench.tables import (
    Table,
    code,
    mebibytes,
    microseconds,
    milliseconds,
    ratio,
)

SIZES = ("B", "H", "Lq", "Lk", "D")


def time_table(timings: list[Timing]) -> Table:
    """Median and spread of each candidate, in milliseconds."""
    candidates = candidates_of(timings)
    rows = [["shape", "pass", "rounds", *code(candidates)]]
    for timing in timings:
        cells = [milliseconds(timing, name) for name in candidates]
        rounds = str(len(timing.seconds[SUBJECT]))
        rows.append([_shape(timing), timing.pass_name, rounds, *cells])
    return rows


def ratio_table(timings: list[Timing]) -> Table:
    """attn_kd over each peer, and its attention alone over sdpa."""
    peers = [name for name in candidates_of(timings) if not name.startswith(SUBJECT)]
    pairs = [(SUBJECT, peer) for peer in peers]
    if any("attn_kd cuda" in timing.seconds for timing in timings):
        pairs.append(("attn_kd cuda", SUBJECT))
    pairs.insert(1, ("attn_kd.attention", "sdpa"))
    rows = [["shape", "pass", *(f"{candidate} / {peer}" for candidate, peer in pairs)]]
    for timing in timings:
        cells = [ratio(timing.ratio(peer, candidate)) for candidate, peer in pairs]
        rows.append([timing.shape, timing.pass_name, *cells])
    return rows


def refusal_table(timings: list[Timing]) -> Table:
    """Who did not run, where, and why not."""
    places: dict[tuple[str, str], list[str]] = {}
    for timing in timings:
        for name, reason in timing.refused.items():
            places.setdefault((name, reason), []).append(f"{timing.shape} {timing.pass_name}")
    rows = [["candidate", "where", "why"]]
    for (name, reason), where in places.items():
        rows.append([f"`{name}`", ", ".join(where), reason.replace("|", "\\|")])
    return rows


def latency_table(timings: list[Timing]) -> Table:
    """Median and spread of each candidate, in microseconds a call."""
    candidates = candidates_of(timings)
    rows = [["shape", "pass", *code(candidates)]]
    for timing in timings:
        cells = [microseconds(timing, name) for name in candidates]
        rows.append([_shape(timing), timing.pass_name, *cells])
    return rows


def overhead_table(timings: list[Timing]) -> Table:
    """What of a small call is arithmetic, in microseconds."""
    rows = [["pass", "candidate", "one call, µs", "its arithmetic, µs", "overhead, µs"]]
    for timing in timings:
        for name in (n for n in timing.seconds if not n.endswith(" heads")):
            parts = (timing.arithmetic(name), timing.overhead(name))
            cells = [microseconds(timing, name), *(f"{1e6 * seconds:.1f}" for seconds in parts)]
            rows.append([timing.pass_name, f"`{name}`", *cells])
    return rows


def modes_table(timings: list[Timing]) -> Table:
    """Each mode beside the default."""
    rows = [["shape", "dtype", "pass", "mode", "time, ms", "of the default"]]
    for timing in timings:
        for name in timing.seconds:
            mode = "default" if name == SUBJECT else name
            cells = [milliseconds(timing, name), ratio(timing.ratio(SUBJECT, name))]
            rows.append([timing.shape, timing.dtype, timing.pass_name, mode, *cells])
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
            row += [milliseconds(timing, name), speed_up]
        rows.append([*row, ratio(timing.ratio("sdpa"))])
    return rows


def split_table(timings: list[Timing]) -> Table:
    """The same work in 64 heads and in one."""
    rows = [["pass", "candidate", "B·H = 64, ms", "B·H = 1, ms", "B·H = 1 / B·H = 64"]]
    for timing in timings:
        for name in ("sdpa", SUBJECT):
            one = f"{name}, one head"
            cells = [milliseconds(timing, name), milliseconds(timing, one)]
            rows.append([timing.pass_name, f"`{name}`", *cells, ratio(timing.ratio(name, one))])
    return rows


def memory_table(memories: list[Memory]) -> Table:
    """Peak memory of each candidate in MiB, and what attn_kd needs beyond sdpa, in maps."""
    memories = sorted(memories, key=lambda memory: memory.map_bytes or 0)
    names = list(dict.fromkeys(name for memory in memories for name in memory.peak_bytes))
    rows = [["shape", "HW", "one map", *code(names), "attn_kd beyond sdpa"]]
    for memory in memories:
        peaks = [mebibytes(memory.median(n)) if n in memory.peak_bytes else "" for n in names]
        beyond = memory.beyond_sdpa()
        cells = [str(memory.sizes.get("Lk", "")), mebibytes(memory.map_bytes or 0), *peaks]
        difference = "" if beyond is None else f"{beyond:+.1%} of a map"
        rows.append([memory.shape, *cells, difference])
    return rows


def error_table(timings: list[Timing]) -> Table:
    """The largest relative error of each candidate over all measurements, per quantity."""
    worst: dict[str, dict[str, float]] = {}
    for timing in timings:
        for name, errors in timing.errors.items():
            largest = worst.setdefault(name, {})
            for quantity, error in errors.items():
                largest[quantity] = max(error, largest.get(quantity, 0.0))
    longest_first = sorted(worst.values(), key=len, reverse=True)
    quantities = list(dict.fromkeys(q for errors in longest_first for q in errors))
    rows = [["candidate", *quantities]]
    for name, errors in worst.items():
        rows.append([f"`{name}`", *(f"{errors[q]:.1e}" if q in errors else "" for q in quantities)])
    return rows


def _shape(timing: Timing) -> str:
    return f"{timing.shape} ({', '.join(str(timing.sizes[name]) for name in SIZES)})"
