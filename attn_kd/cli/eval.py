"""Measure a detector on a split of a COCO data folder.

Prints, and writes as JSON: mAP (IoU 0.50:0.95), mAP50, mAP75; mAP50_short where the data marks
short insertions (over the images so marked and those without an object); images_per_second (the
model alone, one image at a time), parameters, macs (multiply-accumulates) and num_images.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from attn_kd.cli._arguments import (
    add_data_argument,
    add_device_argument,
    positive_int,
    require_writable,
    resolve_device,
    whole_number,
)
from attn_kd.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="model folder of a trained detector",
    )
    add_data_argument(parser)
    parser.add_argument("--split", default="val", metavar="NAME", help="split to measure on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="images in a batch"
    )
    parser.add_argument(
        "--workers", type=whole_number, default=0, metavar="N", help="processes that load images"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    from tqdm import tqdm

    from attn_kd.data import CocoDetection
    from attn_kd.models import load_detector
    from attn_kd.training import evaluate_detector
    from attn_kd.training.records import write_json

    if args.json is not None:
        if args.json.is_dir():
            raise InputError(f"--json {args.json} is a folder; expected a file to write")
        require_writable(args.json.parent)
    model, processor = load_detector(args.model)
    metrics = evaluate_detector(
        model,
        processor,
        CocoDetection(args.data, args.split),
        batch_size=args.batch_size,
        device=device,
        num_workers=args.workers,
        progress=lambda batches: tqdm(
            batches, desc="evaluation", file=sys.stderr, leave=False, disable=args.quiet
        ),
    )
    print("\n".join(f"{name:<18} {_shown(value)}" for name, value in metrics.items()))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, {name: _json_number(value) for name, value in metrics.items()})
    return 0


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if value >= 10 else f"{value:.4f}"


def _json_number(value: float) -> Any:
    """JSON knows no nan, the AP of a split without objects."""
    return None if math.isnan(value) else value
