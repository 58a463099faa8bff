"""The speed and memory attn_kd aims at, as ratios of medians in one run: smaller is better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BOTH = "forward+backward"


@dataclass(frozen=True)
class Goal:
    """The largest ratio candidate / peer aimed at in one measurement, and a first bar before it."""

    shape: str
    pass_name: str
    limit: float
    first: float | None = None
    candidate: str = "attn_kd"
    peer: str = "sdpa"
    dtype: str = "float32"
    kind: str = "time"
    device: str = "cpu"  # a run on another says nothing about it


def _at(shapes: str, *arguments: str | float, **fields: str) -> Iterable[Goal]:
    return (Goal(shape, *arguments, **fields) for shape in shapes.split())  # type: ignore[arg-type]


# Modes of bench_modes.py; `attn_kd` is that of reverse_kl.
HEAD_MEANS = {
    "head mean": "attn_kd",
    **{f"head mean, {divergence}": divergence for divergence in ("forward_kl", "js", "mse")},
}

GOALS: tuple[Goal, ...] = (
    # The divergence included, against attention without it.
    *_at("coco dc5", BOTH, 0.85, 1.10),
    *_at("paper cross", BOTH, 0.90, 1.20),
    *_at("coco dc5", "forward", 1.05, 1.20),
    *_at("coco dc5", BOTH, 0.55, 0.90, dtype="bfloat16"),
    # Attention alone, against the same.
    *_at("coco dc5", "forward", 0.80, candidate="attn_kd.attention"),
    # Against stored maps.
    *_at("coco dc5", "forward", 0.12, 0.20, peer="eager"),
    *_at("coco dc5", BOTH, 0.12, 0.20, peer="eager"),
    *_at("coco dc5", BOTH, 0.12, 0.20, peer="eager", dtype="bfloat16"),
    # Maps averaged over heads, against those of every head and the same divergence.
    *(
        Goal("coco", BOTH, 1.7, 2.5, mean, each, dtype, kind="modes")
        for mean, each in HEAD_MEANS.items()
        for dtype in ("float32", "bfloat16")
    ),
    # The divergence alone, against it and the output.
    *_at("dc5", "forward", 1 / 1.3, candidate="attention_kl_div", peer="attn_kd", kind="modes"),
    *_at("dc5", BOTH, 1 / 1.3, candidate="attention_kl_div", peer="attn_kd", kind="modes"),
    # As much work in one map as in 64 takes as long, within 10 %.
    *_at("64-heads", BOTH, 1.10, candidate="attn_kd, one head", peer="attn_kd", kind="split"),
    *_at("64-heads", BOTH, 1.10, candidate="attn_kd", peer="attn_kd, one head", kind="split"),
    # On a GPU: against the fastest of torch's attentions in the same measurement.
    *_at("dc5 video", "forward", 1.15, 1.5, dtype="bfloat16", device="cuda"),
    *_at("dc5 video", BOTH, 1.25, 1.6, dtype="bfloat16", device="cuda"),
)
# Seconds of a call of B = H = 1, Lq = Lk = 16 beyond its arithmetic, see bench_latency.py.
OVERHEAD = 8e-6
OVERHEAD_PASSES = ("forward", "forward, recorded")
# Peak memory of attn_kd beyond that of sdpa, as a part of one stored float32 map.
EXTRA_MEMORY = 0.02
EXTRA_MEMORY_SHAPE = "dc5"
