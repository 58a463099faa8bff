"""Train a detector from scratch on a COCO data folder: a teacher, or a plain baseline.

--out becomes a model folder (config.json, model.safetensors, preprocessor_config.json), with
training.json (the settings) and history.json (the losses). Ctrl-C stops at a checkpoint, from which
--resume goes on. Settings that are not given are those of the preset's recipe.
"""

from __future__ import annotations

import argparse

from attn_kd.cli._arguments import positive_int, whole_number
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
from attn_kd.training.records import RunFolder

_OPTIONS = (
    *MODEL_OPTIONS,
    Option("--image-size", "image_size", "height and width in pixels", positive_int),
    Option(
        "--pretrain-steps",
        "pretrain_backbone_steps",
        "steps of dense pretraining of the backbone, before; 0: none (default: the preset's)",
        whole_number,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="size of detector: detr-tiny (for CPUs; the default) or detr-r50 (the paper's)",
    )
    add_options(parser, "model", _OPTIONS)
    add_training_arguments(parser, "detector")


def run(args: argparse.Namespace) -> int:
    if args.resume and RunFolder(args.out).begun().teacher is not None:
        raise InputError(f"{args.out} was trained with a teacher; resume it with attn-kd distill")
    config = configuration(args)
    from attn_kd.training import train_detector

    options = run_options(args, title="")
    return finish(lambda: train_detector(config, args.data, args.out, **options))
