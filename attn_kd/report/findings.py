"""What the results say, in a sentence each, whichever way they came out."""

from __future__ import annotations

from dataclasses import dataclass

from attn_kd.report.results import Results


@dataclass(frozen=True)
class Finding:
    """A figure and the sentence that says what it means."""

    figure: str
    text: str


def findings(results: Results) -> list[Finding]:
    """Attention KL, mAP50 and speed of the distilled student against baseline and teacher."""
    found = [_attention(results), _precision(results), _speed(results)]
    return [finding for finding in found if finding is not None]


def _attention(results: Results) -> Finding | None:
    baseline, student = (results.run(role).attention_kl for role in ("baseline", "student"))
    if not baseline or student is None:
        return None
    share = student / baseline
    return Finding(
        f"{share:.0%}" if share < 10 else f"{share:.0f} times",
        f"of the baseline's attention KL is left after distillation: {student:.3f} against "
        f"{baseline:.3f} nats from the teacher's attention.",
    )


def _precision(results: Results) -> Finding | None:
    values = {run.role: run.metrics.get("mAP50") for run in results.runs}
    teacher, baseline, student = values["teacher"], values["baseline"], values["student"]
    if teacher is None or baseline is None or student is None:
        return None
    change = student - baseline
    verdict = "the same as" if abs(change) < 0.0005 else "above" if change > 0 else "below"
    return Finding(
        f"{change:+.3f}",
        f"mAP50: the distilled student reaches {student:.3f}, {verdict} the baseline's "
        f"{baseline:.3f}; the teacher reaches {teacher:.3f}.",
    )


def _speed(results: Results) -> Finding | None:
    teacher, student = (results.run(role).metrics for role in ("teacher", "student"))
    if not teacher.get("images_per_second") or not student.get("images_per_second"):
        return None
    ratio = student["images_per_second"] / teacher["images_per_second"]
    weights = student["parameters"] / teacher["parameters"]
    return Finding(
        f"{ratio:.1f} times",
        f"the teacher's speed, with {weights:.0%} of its parameters: "
        f"{student['images_per_second']:.0f} against {teacher['images_per_second']:.0f} images a "
        "second.",
    )
