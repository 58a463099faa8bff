"""Train a student with a teacher's attention (Rubin et al. 2021, eq. 3).

The student starts from the teacher's backbone and learns from (1 - alpha) times its detection loss
and alpha times the divergence of its last encoder layer's attention from the teacher's. With
--alpha 0 it learns from the detection loss alone and the divergence is only measured: the baseline.
--out becomes a model folder, as that of `attn-kd train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attn_kd.cli._arguments import fraction, non_negative_float, positive_float
from attn_kd.cli._training import (
    MODEL_OPTIONS,
    Option,
    add_options,
    add_training_arguments,
    configuration,
    finish,
    run_options,
)
from attn_kd.errors import InputError
from attn_kd.training.records import RECORD_FILE, RunRecord

_DISTILLATION_OPTIONS = (
    Option("--alpha", "alpha", "weight of the distillation, 0 to 1 (default: 0.7)", fraction),
    Option("--temperature", "temperature", "of the class term (default: 1)", positive_float),
    Option(
        "--class-weight",
        "class_weight",
        "weight of the class term (default: 0)",
        non_negative_float,
    ),
    Option(
        "--own-backbone",
        "teacher_backbone",
        "do not start from the teacher's backbone",
        value=False,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="model folder of the teacher (with --resume: default the one it was begun with)",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="size of detector (default: the teacher's)"
    )
    add_options(parser, "model (default: one encoder and one decoder layer)", MODEL_OPTIONS)
    add_options(parser, "distillation", _DISTILLATION_OPTIONS)
    add_training_arguments(parser, "student")


def run(args: argparse.Namespace) -> int:
    teacher = args.teacher or _recorded_teacher(args)
    config = configuration(args, **_student_of(teacher))
    from attn_kd.training import distill_detector

    options = run_options(args, title="")
    return finish(lambda: distill_detector(config, teacher, args.data, args.out, **options))


def _recorded_teacher(args: argparse.Namespace) -> Path:
    """The teacher that an interrupted training was begun with."""
    if not args.resume:
        raise InputError("--teacher is missing; expected the model folder of a trained detector")
    teacher = RunRecord.load(args.out / RECORD_FILE).teacher
    if teacher is None:
        raise InputError(f"{args.out} was trained without a teacher; resume it with attn-kd train")
    return Path(teacher.folder)


def _student_of(teacher: Path) -> dict[str, Any]:
    """Settings that a student has from its teacher, if that was trained here."""
    student: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1}
    if (teacher / RECORD_FILE).is_file():
        settings = RunRecord.load(teacher / RECORD_FILE).config
        student["preset"] = settings.preset
    return student
