"""Detect objects in images, folders of images, animations and videos.

Writes predictions.json (per frame: source, frame, width, height, picture, and detections with box
[x1, y1, x2, y2] in pixels, score, label and name) and pictures/ with the boxes drawn in. Earlier
output in the same folder is replaced, other files never.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attn_kd.cli._arguments import (
    add_device_argument,
    add_output_argument,
    fraction,
    positive_int,
    require_writable,
    resolve_device,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="image, video, or folder of images and videos",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="model folder of a trained detector",
    )
    add_output_argument(parser, "predictions.json and pictures/")
    parser.add_argument(
        "--threshold", type=fraction, default=0.5, metavar="P", help="lowest score to keep"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="frames per batch"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write predictions.json only")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    from attn_kd.inference.detector import Detector
    from attn_kd.inference.frames import find_sources, iter_frames
    from attn_kd.inference.predictions import write_predictions

    device = resolve_device(args.device)
    files = find_sources(args.inputs)
    out = require_writable(args.out)
    detector = Detector.from_pretrained(args.model, device=device)
    document = write_predictions(
        detector,
        iter_frames(files),
        out,
        model_name=str(args.model),
        threshold=args.threshold,
        batch_size=args.batch_size,
        pictures=not args.no_pictures,
    )
    frames = document["frames"]
    found = sum(len(frame["detections"]) for frame in frames)
    print(f"{found} objects in {len(frames)} frames; wrote {args.out / 'predictions.json'}")
    return 0
