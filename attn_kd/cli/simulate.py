"""Write simulated ultrasound of needle insertions as a data folder in COCO format.

Images are the last frames of clips of one second; 60 % of them show a needle, which is the one
object to find. A picture of some clips comes with --contact-sheet, alone or beside the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from attn_kd.cli._arguments import (
    add_device_argument,
    positive_int,
    require_writable,
    resolve_device,
    whole_number,
)
from attn_kd.errors import InputError

if TYPE_CHECKING:
    from attn_kd.data.needle import NeedleSettings

_SPLITS = {"train": 2000, "val": 300, "test": 300}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the data")
    for split, count in _SPLITS.items():
        parser.add_argument(
            f"--{split}",
            type=whole_number,
            default=count,
            metavar="N",
            help=f"clips of the {split} split",
        )
    parser.add_argument(
        "--size", type=positive_int, default=128, metavar="PX", help="height and width of a frame"
    )
    parser.add_argument(
        "--frames", type=positive_int, default=30, metavar="N", help="frames of a clip"
    )
    parser.add_argument(
        "--whole-clips",
        action="store_true",
        help="write every frame, unlabelled but for the last; 30 times the files",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the data folder in --out")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="PNG", help="picture of clips of each kind"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    from attn_kd.data.needle import NeedleSettings

    if args.out is None and args.contact_sheet is None:
        raise InputError("nothing to write; expected --out DIR or --contact-sheet PNG")
    settings = NeedleSettings(size=args.size, frames=args.frames)
    if args.contact_sheet is not None:
        _require_place_for(args.contact_sheet)
    if args.out is not None:
        _write_data(args, settings)
    if args.contact_sheet is not None:
        _write_contact_sheet(args, settings)
    return 0


def _require_place_for(file: Path) -> None:
    """Raise InputError, before the work starts, where a file cannot be written."""
    if file.is_dir():
        raise InputError(f"{file} is a folder; expected a file to write")
    if not file.parent.is_dir():
        raise InputError(f"cannot write {file}: there is no folder {file.parent}")
    require_writable(file.parent)


def _write_data(args: argparse.Namespace, settings: NeedleSettings) -> None:
    from tqdm.auto import tqdm

    from attn_kd.data.needle import write_coco

    num_clips = {split: count for split in _SPLITS if (count := getattr(args, split))}
    with tqdm(total=sum(num_clips.values()), unit="clip", delay=0.5, disable=args.quiet) as bar:
        write_coco(
            args.out,
            num_clips,
            seed=args.seed,
            settings=settings,
            whole_clips=args.whole_clips,
            device=resolve_device(args.device),
            overwrite=args.overwrite,
            progress=bar.update,
        )
    counts = ", ".join(f"{count} {split}" for split, count in num_clips.items())
    print(f"wrote {args.out}: {counts} clips")


def _write_contact_sheet(args: argparse.Namespace, settings: NeedleSettings) -> None:
    from attn_kd._atomic import replacing_file
    from attn_kd.data.needle.contact_sheet import contact_sheet

    sheet = contact_sheet(seed=args.seed, settings=settings)
    with replacing_file(args.contact_sheet) as file:
        sheet.save(file, format="PNG", optimize=True)
    print(f"wrote {args.contact_sheet}")
