"""Keep on disk what a teacher makes of a data folder, so that students train without running it.

Of every image --out holds query, key and log-sum-exp of the teacher's chosen attention layers, its
class logits and boxes, in files of a fixed number of images with a checksum each; and the teacher's
backbone. `attn-kd distill --teacher-cache OUT` learns from that. A run that was interrupted is
continued by the same command, and so is a cache of which files are missing or damaged.

A student must see the images that the cache has: --views 1 has them as they are (train with
--no-augment); with --views N there are N - 1 augmented ones besides, and every epoch sees one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attn_kd.cli._arguments import (
    add_data_argument,
    add_device_argument,
    add_output_argument,
    positive_int,
    require_writable,
    resolve_device,
)
from attn_kd.cli._layers import KINDS_OPTION, require_kinds_apply, teacher_layers
from attn_kd.cli._training import Option, add_options
from attn_kd.training.config import MIXED_PRECISIONS

_LAYERS_OPTION = Option(
    "--layers",
    "layers",
    "last (default); all; or paths of attention modules, such as model.encoder.layers.2.self_attn "
    "(the pairs that attn-kd distill takes may be given as they are: the teacher's are kept)",
    str,
    metavar=("last|all|PATH", "PATH"),
    several=True,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher", required=True, type=Path, metavar="DIR", help="model folder of the teacher"
    )
    add_data_argument(parser)
    add_output_argument(parser, "the cache")
    parser.add_argument("--split", default="train", metavar="NAME", help="split to run over")
    parser.add_argument(
        "--dtype",
        default="float16",
        choices=("float16", "bfloat16", "float32"),
        help="of query and key",
    )
    parser.add_argument(
        "--amp",
        default="none",
        choices=MIXED_PRECISIONS,
        help="mixed precision of the teacher; students need the same unless it is none",
    )
    parser.add_argument(
        "--views", type=positive_int, default=1, metavar="N", help="views of each image"
    )
    parser.add_argument(
        "--images-per-shard", type=positive_int, default=32, metavar="N", help="images in a file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another cache in --out")
    add_device_argument(parser)
    add_options(parser, "which attention layers are kept", (_LAYERS_OPTION, KINDS_OPTION))


def run(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    require_writable(args.out)
    layers = teacher_layers(args.layers or ["last"])
    require_kinds_apply(args.kinds, layers)
    from tqdm import tqdm

    from attn_kd.training import CacheOptions, cache_teacher

    options = CacheOptions(
        split=args.split,
        layers=layers,
        kinds=args.kinds or ["encoder_self"],
        dtype=args.dtype,
        amp=args.amp,
        views=args.views,
        seed=args.seed,
        images_per_shard=args.images_per_shard,
    )
    cache = cache_teacher(
        args.teacher,
        args.data,
        args.out,
        options,
        device=device,
        overwrite=args.overwrite,
        progress=lambda images: tqdm(
            images, desc="teacher cache", unit="image", file=sys.stderr, disable=args.quiet
        ),
    )
    size = sum((cache.folder / shard.file).stat().st_size for shard in cache.shards)
    count, kept = len(cache.recipe.images), len(cache.recipe.layers)
    print(
        f"{count} image{'s' * (count > 1)}, {kept} layer{'s' * (kept > 1)}, "
        f"{size / 1e6:.1f} MB ({size / count / 1e3:.1f} kB an image); wrote {cache.folder}"
    )
    return 0
