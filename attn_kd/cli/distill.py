"""Train a student with a teacher's attention (Rubin et al. 2021, eq. 3).

The student starts from the teacher's backbone and learns from (1 - alpha) times its detection loss
and alpha times the divergence of its attention maps from the teacher's: that of the last encoder
layer, unless --layers and --kinds say otherwise. With --alpha 0 it learns from the detection loss
alone and the divergence is only measured: the baseline.

Layers are named by the paths of their attention modules, several pairs in a row:
--layers model.encoder.layers.0.self_attn=model.encoder.layers.2.self_attn
A wrong path is answered with near ones. The maps of paired layers must have as many heads (else:
--head-map, --head-reduction mean) and lie on one grid of image positions (else: --alignment).

With --teacher-cache the teacher does not run, and need not be there (see attn-kd cache-teacher).
--out becomes a model folder, as that of `attn-kd train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attn_kd.cli._arguments import fraction, non_negative_float, positive_float
from attn_kd.cli._layers import (
    KINDS_OPTION,
    head_map,
    layer_selection,
    require_kinds_apply,
    token_grid,
)
from attn_kd.cli._training import (
    MODEL_OPTIONS,
    Option,
    add_options,
    add_training_arguments,
    configuration,
    finish,
    run_options,
)
from attn_kd.distill.alignment import ALIGNMENTS
from attn_kd.errors import InputError
from attn_kd.ops.checks import DIVERGENCES, HEAD_REDUCTIONS
from attn_kd.training.records import RECORD_FILE, RunFolder, RunRecord

_DISTILLATION_OPTIONS = (
    Option(
        "--alpha",
        "alpha",
        "weight of the distillation, 0 to 1 (default: 0.7)",
        fraction,
        metavar="X",
    ),
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
_ATTENTION_OPTIONS = (
    Option(
        "--layers",
        "layers",
        "last: the last layer learns from the teacher's last (default, the paper); all: every "
        "layer learns from a teacher layer of like depth; or pairs of attention modules, by path",
        str,
        metavar=("last|all|STUDENT=TEACHER", "STUDENT=TEACHER"),
        several=True,
    ),
    KINDS_OPTION,
    Option(
        "--divergence",
        "divergence",
        "of two maps, by the formulae of attn_kd.attention_kl (default: reverse_kl, which is "
        "KL(student || teacher), the paper's)",
        str,
        DIVERGENCES,
    ),
    Option(
        "--head-reduction",
        "head_reduction",
        "none: head by head (default); mean: maps averaged over heads, whose numbers may differ",
        str,
        HEAD_REDUCTIONS,
    ),
    Option(
        "--head-map",
        "head_map",
        "the teacher's head, from 0, that each of the student's learns from, such as 0,2,4,6 "
        "(default: the one of its own number); for one layer, by its path, STUDENT=0,2,4,6",
        str,
        metavar=("HEADS|STUDENT=HEADS", "STUDENT=HEADS"),
        several=True,
    ),
    Option(
        "--alignment",
        "alignment",
        "for a teacher whose grid of image positions is another: resample interpolates its queries "
        "and keys; group adds up its attention over each position of the student's grid, which "
        "must divide the teacher's (default: none, the grids are the same)",
        str,
        ALIGNMENTS,
    ),
    Option(
        "--teacher-grid",
        "teacher_grid",
        "the teacher's image positions, height x width, such as 26x26 (default: from the size of "
        "the images)",
        token_grid,
        metavar="HxW",
    ),
    Option("--student-grid", "student_grid", "the student's", token_grid, metavar="HxW"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="model folder of the teacher (with --resume: default the one it was begun with)",
    )
    parser.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="DIR",
        help="what attn-kd cache-teacher has kept of it; --teacher, if given too, must match",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="size of detector (default: the teacher's)"
    )
    add_options(parser, "model (default: one encoder and one decoder layer)", MODEL_OPTIONS)
    add_options(parser, "distillation", _DISTILLATION_OPTIONS)
    add_options(parser, "which attention maps are compared, and how", _ATTENTION_OPTIONS)
    add_training_arguments(parser, "student")


def run(args: argparse.Namespace) -> int:
    teacher, cache = _teacher(args)
    if args.layers is not None:
        args.layers = layer_selection(args.layers)
    if args.head_map is not None:
        args.head_map = head_map(args.head_map)
    config = configuration(args, **_student_of(teacher, cache))
    require_kinds_apply(args.kinds, config.layers)
    from attn_kd.training import distill_detector

    options = {**run_options(args, title=""), "teacher_cache": cache}
    return finish(lambda: distill_detector(config, teacher, args.data, args.out, **options))


def _teacher(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The teacher's folder and its cache: as given, else those of the interrupted training."""
    if args.teacher is not None or args.teacher_cache is not None:
        return args.teacher, args.teacher_cache
    if not args.resume:
        raise InputError(
            "--teacher is missing; expected the model folder of a trained detector, or its "
            "--teacher-cache"
        )
    record = RunFolder(args.out).begun()
    if record.teacher is None:
        raise InputError(f"{args.out} was trained without a teacher; resume it with attn-kd train")
    if record.teacher_cache is not None:
        return None, Path(record.teacher_cache.folder)
    return Path(record.teacher.folder), None


def _student_of(teacher: Path | None, cache: Path | None) -> dict[str, Any]:
    """Settings that a student has from its teacher, if that was trained here."""
    student: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1}
    for folder in (teacher, cache and cache / "teacher"):
        if folder is not None and (folder / RECORD_FILE).is_file():
            student["preset"] = RunRecord.load(folder / RECORD_FILE).config.preset
            break
    return student
