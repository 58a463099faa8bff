"""The table of results: the same rows as text for a terminal and as HTML for the page."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attn_kd.report.memory import AttentionMemory
from attn_kd.report.results import Results, Run

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A measured quantity: its heading, what it means, and how a run's value is written."""

    heading: str
    meaning: str
    cell: Callable[[Run], str]


def _metric(name: str, write: Callable[[float], str]) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        value = run.metrics.get(name)
        return MISSING if value is None else write(value)

    return cell


def _attention_kl(run: Run) -> str:
    if run.role == "teacher" or run.attention_kl is None:
        return MISSING
    return f"{run.attention_kl:.4f}"


COLUMNS = (
    Column("Parameters", "all weights, backbone included", _metric("parameters", "{:,}".format)),
    Column("MACs", "multiply-accumulates for one image", _metric("macs", lambda n: write_macs(n))),
    Column("Images/s", "on this machine", _metric("images_per_second", "{:.0f}".format)),
    Column("mAP50", "average precision at IoU 0.5", _metric("mAP50", "{:.3f}".format)),
    Column("mAP50 short", "the same on short insertions", _metric("mAP50_short", "{:.3f}".format)),
    Column("Attention KL", "KL(student ‖ teacher), last encoder layer, nats", _attention_kl),
)


def text_table(results: Results) -> str:
    """The results for a terminal: one line per run, then the peak memory."""
    rows = [["", *(column.heading for column in COLUMNS)]]
    rows += [[run.name, *(column.cell(run) for column in COLUMNS)] for run in results.runs]
    lines = _aligned(rows)
    lines.insert(1, "-" * len(lines[0]))
    if results.memory is not None:
        lines += ["", f"Peak memory of the attention loss: {memory_sentence(results.memory)}"]
    return "\n".join(lines) + "\n"


def html_table(results: Results) -> str:
    """The results as an HTML table."""
    headings = "".join(
        f'<th scope="col">{html.escape(column.heading)}<small>{html.escape(column.meaning)}</small>'
        "</th>"
        for column in COLUMNS
    )
    rows = "".join(_html_row(run) for run in results.runs)
    return (
        '<div class="scroll"><table><caption class="hidden">Results of the three detectors'
        f"</caption><thead><tr><td></td>{headings}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def memory_sentence(memory: AttentionMemory) -> str:
    """Both peaks, their ratio if there is one, and the sizes they were measured at."""
    fused, eager = memory.fused_bytes, memory.eager_bytes
    # Small work may fit into what the process holds already: then its peak does not grow.
    ratio = ""
    if fused > 0:
        times = eager / fused
        ratio = f" ({times:.{1 if times < 10 else 0}f} times as much)"
    return (
        f"fused {write_bytes(fused)}, eager {write_bytes(eager)}{ratio}, forward and backward of "
        f"one layer at {memory.tokens:,} tokens, {memory.heads} heads of {memory.head_dim}, "
        f"{memory.backend} backend"
    )


def write_bytes(count: float) -> str:
    """``count`` bytes in MB or GB (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def write_macs(count: float) -> str:
    """``count`` multiply-accumulates in millions or thousands of millions."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _html_row(run: Run) -> str:
    cells = "".join(f"<td>{html.escape(column.cell(run))}</td>" for column in COLUMNS)
    swatch = f'<span class="swatch {run.role}"></span>'
    return f'<tr><th scope="row">{swatch}{html.escape(run.name)}</th>{cells}</tr>'


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
