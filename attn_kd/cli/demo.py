"""The main job, small: distil a detection transformer on simulated ultrasound, and see what it did.

Simulates clips of needle insertions, trains a deep teacher, a shallow baseline student (alpha = 0)
and a distilled student (alpha = 0.7, otherwise the same), measures all three on clips of other
seeds, and measures the peak memory of the attention loss. Writes report.html, report.json,
results.txt and the three model folders. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_kd.cli._arguments import (
    add_device_argument,
    add_output_argument,
    require_writable,
    resolve_device,
)

if TYPE_CHECKING:
    from attn_kd.training import TrainingConfig

SAMPLES = 6  # frames shown in the report
STAGES = 6


@dataclass(frozen=True)
class Size:
    """How much is simulated and trained."""

    train_clips: int
    test_clips: int
    teacher_layers: int
    teacher: dict[str, Any]  # fields of TrainingConfig
    student: dict[str, Any]
    memory_tokens: int  # at which the attention loss's peak memory is measured


# In these ten minutes a 6/6 teacher is further from converged than a 3/3, and worse.
FULL = Size(
    train_clips=8000,
    test_clips=500,
    teacher_layers=3,
    teacher={"pretrain_backbone_steps": 1500, "max_steps": 2000},
    student={"max_steps": 1000},
    memory_tokens=4200,  # one image in DETR-DC5
)
QUICK = Size(
    train_clips=64,
    test_clips=24,
    teacher_layers=2,
    teacher={"pretrain_backbone_steps": 6, "max_steps": 12, "log_steps": 1},
    student={"max_steps": 12, "log_steps": 1},
    memory_tokens=1024,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_argument(parser, "report, results and models")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute of everything, to see that it works; its figures mean little",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="skip the stages that an interrupted run has finished"
    )
    again.add_argument(
        "--overwrite", action="store_true", help="begin anew where a demo was run before"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    device = resolve_device(args.device)
    size = QUICK if args.quick else FULL
    out = require_writable(args.out)

    from attn_kd.data import CocoDetection
    from attn_kd.report.comparison import Comparison, measure_memory
    from attn_kd.report.page import write_report
    from attn_kd.report.results import Results
    from attn_kd.report.samples import draw_samples
    from attn_kd.report.stages import Stages

    teacher, student = _configs(size, args.seed)
    comparison = Comparison(
        teacher, student, out / "data", out, device=device, progress=not args.quiet
    )
    settings = {"seed": args.seed, **vars(size)}
    stages = Stages(
        out,
        settings,
        resume=args.resume,
        overwrite=args.overwrite,
        announce=_Announcer(started),
    )
    try:
        stages.run("simulation", lambda _: _simulate(size, args, out / "data"))
        runs = comparison.run(stages)
        memory = measure_memory(stages, size.memory_tokens)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"attn-kd demo --out {args.out} --resume, with the options given, goes on from here"
        ) from None
    results = Results(
        runs,
        evaluated_on=f"{size.test_clips} simulated clips of unseen seeds",
        memory=memory,
        settings=_shown_settings(size, student, args.seed),
        quick=args.quick,
    )
    samples = draw_samples(CocoDetection(out / "data", "test"), SAMPLES, seed=args.seed)
    page = write_report(results, samples, out)
    print(f"\n{(out / 'results.txt').read_text()}")
    if args.quick:
        print("A quick run: these figures mean little.")
    print(f"Report: {page} ({time.perf_counter() - started:.0f} s in all)")
    return 0


def _configs(size: Size, seed: int) -> tuple[TrainingConfig, TrainingConfig]:
    """How teacher and distilled student are trained."""
    from attn_kd.training import TrainingConfig

    def config(layers: int, fields: dict[str, Any]) -> TrainingConfig:
        return TrainingConfig.for_preset(
            "detr-tiny",
            encoder_layers=layers,
            decoder_layers=layers,
            num_queries=1,  # at most one needle in a frame; so did Rubin et al. 2021
            # Simulated clips are plentiful, and zooming would take away the cue that a needle
            # enters at the side of the image.
            augment=False,
            seed=seed,
            **fields,
        )

    # As in the paper: the students keep the teacher's backbone and train the transformer alone.
    frozen = {"freeze_backbone": True, "cache_features": True}
    student = config(1, {"alpha": 0.7, **frozen, **size.student})
    return config(size.teacher_layers, size.teacher), student


def _simulate(size: Size, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tqdm import tqdm

    from attn_kd.data.needle import write_coco

    clips = {"train": size.train_clips, "test": size.test_clips}
    with tqdm(total=sum(clips.values()), desc="clips", unit="clip", disable=args.quiet) as bar:
        write_coco(folder, clips, seed=args.seed, overwrite=True, progress=bar.update)
    return {}


def _shown_settings(size: Size, student: TrainingConfig, seed: int) -> dict[str, Any]:
    return {
        "preset": student.preset,
        "training clips": size.train_clips,
        "test clips": size.test_clips,
        "steps, teacher": size.teacher["max_steps"],
        "steps, each student": size.student["max_steps"],
        "alpha": student.alpha,
        "seed": seed,
    }


class _Announcer:
    """Says on stdout which stage begins."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._number = 0

    def __call__(self, stage: str, done: bool) -> None:
        self._number += 1
        seconds = time.perf_counter() - self._started
        remark = "done before" if done else f"at {seconds:.0f} s"
        print(f"[{self._number}/{STAGES}] {stage} ({remark})", flush=True)
