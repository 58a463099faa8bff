"""Sample frames side by side: what each detector finds in them, and where it looks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from attn_kd.inference import Detector
from attn_kd.report.attention_maps import EncoderAttention, encoder_attention, row_divergence
from attn_kd.report.results import Results
from attn_kd.report.scenes import Sample, draw_attention, draw_query, draw_scene

SCORE_THRESHOLD = 0.5


def detection_gallery(
    samples: Sequence[Sample], detectors: Mapping[str, Detector], results: Results
) -> str:
    """One row per detector, one column per sample."""
    cells = []
    for run in results.runs:
        cells.append(f'<div class="head">{html.escape(run.name)}</div>')
        for number, sample in enumerate(samples, start=1):
            (found,) = detectors[run.role].predict([sample.image], threshold=SCORE_THRESHOLD)
            label = f"{run.name}, frame {number} ({sample.caption}): {len(found)} detections"
            cells.append(f"<div>{draw_scene(sample, run.role, found, label=label)}</div>")
    cells.append("<div></div>")
    cells += [f'<p class="note">{html.escape(sample.caption)}</p>' for sample in samples]
    return _grid(cells, f"4.6rem repeat({len(samples)}, 1fr)")


def attention_gallery(
    samples: Sequence[Sample], detectors: Mapping[str, Detector], results: Results
) -> str:
    """One row per sample: the frame with its query, then a map per detector."""
    heads = ["Frame and query", *(run.name for run in results.runs)]
    cells = [f'<div class="head">{html.escape(head)}</div>' for head in heads]
    for number, sample in enumerate(samples, start=1):
        cells += _attention_row(sample, number, detectors, results)
    return _grid(cells, f"repeat({len(heads)}, 1fr)")


def _attention_row(
    sample: Sample, number: int, detectors: Mapping[str, Detector], results: Results
) -> list[str]:
    attention = {
        run.role: encoder_attention(detectors[run.role], sample.image) for run in results.runs
    }
    teacher = attention["teacher"]
    x1, y1, x2, y2 = sample.boxes[0]
    width, height = sample.image.size
    token = teacher.token_at((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
    query = _middle(token, teacher, width, height)
    label = f"frame {number} with the query position"
    cells = [f"<div>{draw_query(sample, query, label=label)}{_note(sample.caption)}</div>"]
    for run in results.runs:
        label = f"Attention of {run.name} in frame {number}"
        weights = attention[run.role].row(token)
        picture = draw_attention(sample, weights, query, label=label)
        note = f"brightest {weights.max():.3f}"
        if run.role != "teacher":
            note += f", KL {row_divergence(attention[run.role], teacher, token):.3f}"
        cells.append(f"<div>{picture}{_note(note)}</div>")
    return cells


def _middle(
    token: int, attention: EncoderAttention, width: int, height: int
) -> tuple[float, float]:
    """The middle of a token's patch in pixels of the picture."""
    row, column = divmod(token, attention.width)
    return (column + 0.5) * width / attention.width, (row + 0.5) * height / attention.height


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _grid(cells: Sequence[str], columns: str) -> str:
    return (
        f'<div class="scroll"><div class="frames" style="grid-template-columns:{columns};'
        f'min-width:44rem">{"".join(cells)}</div></div>'
    )
