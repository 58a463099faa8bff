"""The report as a page that needs nothing beside itself: no script, no request, no font."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from attn_kd._atomic import replacing_file
from attn_kd.inference import Detector
from attn_kd.report.curves import Curve, draw_curves
from attn_kd.report.findings import findings
from attn_kd.report.galleries import attention_gallery, detection_gallery
from attn_kd.report.memory import AttentionMemory
from attn_kd.report.results import Results, describe_machine
from attn_kd.report.scenes import Sample
from attn_kd.report.stylesheet import CSS
from attn_kd.report.table import html_table, memory_sentence, text_table, write_bytes


def write_report(results: Results, samples: Sequence[Sample], out: Path) -> Path:
    """Write ``report.html``, ``report.json`` and ``results.txt`` into ``out``; return the first.

    The detectors of the runs are loaded and run on ``samples``; samples with boxes are shown with
    attention maps too.

    Raises:
        InputError: a run's model folder is missing or broken.
    """
    detectors = {run.role: Detector.from_pretrained(run.folder) for run in results.runs}
    page = _page(results, samples, detectors)
    contents = {
        "results.txt": text_table(results),
        "report.json": json.dumps(results.to_dict(), indent=1) + "\n",
        "report.html": page,
    }
    for name, content in contents.items():
        with replacing_file(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return out / "report.html"


def _page(results: Results, samples: Sequence[Sample], detectors: dict[str, Detector]) -> str:
    sections = [
        _header(results),
        _section("Results", html_table(results), _table_note(results)),
        _curves(results),
        _section(
            "Attention maps",
            "<p>Where the last encoder layer looks from one cell of its grid, the one in which the "
            "middle of the labelled object lies (ring: the middle of the cell): the average over "
            "heads, each from dark (0) to its own brightest. Under each map, its largest weight, "
            "and its KL from the teacher's in nats.</p>",
            attention_gallery(
                [sample for sample in samples if sample.boxes][:3], detectors, results
            ),
        ),
        _section(
            "Detections",
            "<p>Frames drawn at random from the evaluated ones, as many of each kind as can be. "
            "Dashed green: the label; solid: detections with a score of at least 0.5.</p>",
            detection_gallery(samples, detectors, results),
        ),
        _memory(results.memory),
        _section("How this was made", _settings(results)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>Attention distillation report</title>'
        f"<style>{CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _header(results: Results) -> str:
    warning = (
        '<p class="warning">A quick run: trained far too briefly for its figures to mean '
        "anything. It shows that everything works.</p>"
        if results.quick
        else ""
    )
    cards = "".join(
        f"<li><b>{html.escape(finding.figure)}</b><span>{html.escape(finding.text)}</span></li>"
        for finding in findings(results)
    )
    return (
        "<header><h1>Attention distillation of a detection transformer</h1>"
        '<p class="lead">A deep teacher, and two shallow students trained alike: one without and '
        "one with the teacher's attention to follow.</p></header>"
        f'{warning}<ul class="findings">{cards}</ul>'
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def _table_note(results: Results) -> str:
    return (
        f'<p class="note">Evaluated on {html.escape(results.evaluated_on)}. One training run each, '
        "so small differences of mAP between the students can be chance.</p>"
    )


def _curves(results: Results) -> str:
    """Fig. 4 of Rubin et al. 2021, and the losses."""

    def curves(roles: Sequence[str], key: str) -> list[Curve]:
        chosen = [results.run(role) for role in roles]
        found = [Curve.from_history(run.role, run.name, run.history, key) for run in chosen]
        return [curve for curve in found if curve.values]

    def figure(draw: Callable[[], str], caption: str) -> str:
        return f"<figure>{draw()}<figcaption>{caption}</figcaption></figure>"

    attention = curves(["baseline", "student"], "attention_kl")
    losses = curves(["teacher", "baseline", "student"], "detection_loss")
    return _section(
        "Training",
        '<div class="pair">',
        figure(
            lambda: draw_curves(
                attention,
                title="Attention KL of baseline and distilled student by training step",
                value_label="KL(student ‖ teacher), nats",
                logarithmic=True,
            ),
            "Distance of the student's attention from the teacher's, as in Fig. 4 of Rubin et al. "
            "2021. The baseline's is only measured; the distilled student learns from it.",
        ),
        figure(
            lambda: draw_curves(
                losses,
                title="Detection loss of the three detectors by training step",
                value_label="detection loss",
            ),
            "DETR's own loss: classes, boxes and overlap, summed over decoder layers, of which the "
            "teacher has more.",
        ),
        "</div>",
    )


def _memory(memory: AttentionMemory | None) -> str:
    if memory is None:
        return ""
    rows = "".join(
        f'<span>{name}</span><div style="width:{100 * size / memory.eager_bytes:.1f}%;'
        f'background:var(--{colour})" role="img" aria-label="{write_bytes(size)}"></div>'
        for name, size, colour in (
            ("fused", memory.fused_bytes, "student"),
            ("eager", memory.eager_bytes, "baseline"),
        )
    )
    sentence = memory_sentence(memory)
    sentence = sentence[0].upper() + sentence[1:]
    return _section(
        "Peak memory of the attention loss",
        f'<div class="bar">{rows}</div><p>{html.escape(sentence)}.</p>'
        f'<p class="note">Growth of the resident set in a process of its own. One float32 map of '
        f"that size takes {write_bytes(memory.map_bytes)}.</p>",
    )


def _settings(results: Results) -> str:
    seconds = {
        f"training, {run.name}": f"{run.seconds:.0f} s"
        for run in results.runs
        if run.seconds is not None
    }
    rows = {**results.settings, **seconds, **describe_machine()}
    items = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in rows.items()
    )
    return f"<dl>{items}</dl>"
