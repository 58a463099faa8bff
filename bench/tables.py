"""Tables as markdown, and what stands in their cells."""

from __future__ import annotations

from bench.measurements import Timing

Table = list[list[str]]  # the first row is the head


def markdown(table: Table) -> str:
    """The table with its columns aligned, so that it also reads as plain text."""
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def code(names: list[str]) -> list[str]:
    """Names of candidates as they are set in a head."""
    return [f"`{name}`" for name in names]


def milliseconds(timing: Timing, candidate: str) -> str:
    """Median ± half the interquartile range; empty for a candidate that did not run."""
    return _duration(timing, candidate, unit=1e-3)


def microseconds(timing: Timing, candidate: str) -> str:
    """As `milliseconds`, of a thousandth of the unit."""
    return _duration(timing, candidate, unit=1e-6)


def mebibytes(peak_bytes: float) -> str:
    return f"{peak_bytes / 2**20:.{0 if peak_bytes >= 100 * 2**20 else 1}f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def verdict(value: float, limit: float, written: str) -> str:
    """Whether a value that should not exceed a limit does."""
    return f"≤ {written} {'met' if value <= limit else 'missed'}"


def _duration(timing: Timing, candidate: str, unit: float) -> str:
    if candidate not in timing.seconds:
        return ""
    median, spread = timing.median(candidate) / unit, timing.spread(candidate)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    uncertainty = "" if spread is None else f" ± {spread / unit / 2:.{digits}f}"
    return f"{median:.{digits}f}{uncertainty}"
