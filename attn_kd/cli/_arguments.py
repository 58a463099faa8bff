"""Arguments that several commands share: each is declared, explained and checked in one place."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from attn_kd.errors import InputError

if TYPE_CHECKING:
    import torch


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command; the frame adds and applies them, commands only read them."""
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--seed", type=whole_number, metavar="N", help="seed of everything random (default: 0)"
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="threads torch computes with (default: what torch chooses)",
    )
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bars, results only")


def apply_common_arguments(args: argparse.Namespace) -> None:
    """Seed torch and set its threads, before the command runs.

    ``args.seed_is_given`` says whether the seed is the user's or the default.
    """
    import torch

    args.seed_is_given = args.seed is not None
    args.seed = args.seed or 0
    torch.manual_seed(args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``; turn its value into a device with :func:`resolve_device`."""
    parser.add_argument(
        "--device",
        default=None,
        metavar="NAME",
        help="cpu, cuda or cuda:N (default: cuda where a GPU is usable, else cpu)",
    )


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """``--data``: a data folder in COCO format."""
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="data folder in COCO format: images/ and annotations/instances_{train,val,test}.json",
    )


def add_output_argument(
    parser: argparse.ArgumentParser, what: str, *, required: bool = True
) -> None:
    """``--out``, a folder for ``what``; check it with :func:`require_writable`."""
    parser.add_argument(
        "--out",
        required=required,
        type=Path,
        metavar="DIR",
        help=f"folder for {what}",
    )


def resolve_device(name: str | None) -> torch.device:
    """The device called ``name``; ``None`` takes the GPU if there is one.

    Raises:
        InputError: ``name`` is no device, or one this machine does not have.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is no device; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not supported; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name!r} is not usable: torch sees {torch.cuda.device_count()} GPUs"
        )
    return device


def require_writable(folder: Path) -> Path:
    """Make sure that ``folder``, or the nearest parent there is, takes a file; make no folder.

    Called before the work starts, so that hours of training do not end in a refused write.

    Raises:
        InputError: it takes none, or is no folder; the message gives the system's reason.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    return _whole(text, minimum=1)


def whole_number(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    return _whole(text, minimum=0)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    number = _real(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    number = _real(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def fraction(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    number = _real(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def _whole(text: str, *, minimum: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least {minimum}, got {text!r}"
        )
    return number


def _real(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return number
