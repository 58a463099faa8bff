"""What the build of this installation recorded, so that a missing extension can be explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

RECORD = Path(__file__).with_name("_build.json")


class BuildRecord(NamedTuple):
    """The outcome of the last build; written by setup.py."""

    extension: bool  # whether attn_kd._C was built
    reason: str | None  # why it was not
    torch: str | None  # version of the torch it was built against
    cuda: str | None = None  # why it has no CUDA kernels, where it has none


def build_record() -> BuildRecord | None:
    """Return the record of the build; None where there is none that can be read.

    A source tree that was never built has none. A damaged one must not keep attn_kd from being
    imported, so it counts as none.
    """
    try:
        facts = json.loads(RECORD.read_text())
        defaults = BuildRecord._field_defaults  # facts that records did not always have
        return BuildRecord(*({**defaults, **facts}[name] for name in BuildRecord._fields))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def missing_extension_reason() -> str:
    """Say in one line why ``attn_kd._C`` is absent."""
    record = build_record()
    if record is None:
        return "this source tree was not built: run `pip install --no-build-isolation -e .`"
    return record.reason or "it was built but has since been removed: install attn_kd again"


def missing_cuda_reason() -> str | None:
    """Say in one line why ``attn_kd._C`` has no CUDA kernels, where the record does."""
    record = build_record()
    return None if record is None else record.cuda


def torch_mismatch(running: str) -> str | None:
    """Say in one line why an extension of this build must not be loaded into torch `running`.

    None where it may be. libtorch promises no stable C++ ABI between releases: an extension of
    another one may well resolve all its symbols and then crash or corrupt memory. Patch releases
    (2.13.0, 2.13.1) are fixes on the same branch and keep its headers, which is also what other
    extensions' wheels for "torch 2.13" rely on; the local part (+cpu, +cu130) says how torch was
    packaged. So major.minor decides. Nightly and source builds have no such promise and must be
    the very same version.
    """
    record = build_record()
    if record is None or not record.extension or record.torch is None:
        return None
    if _abi(record.torch) == _abi(running):
        return None
    return f"it was built for torch {record.torch}, this is {running}: install attn_kd again"


def _abi(version: str) -> str:
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+.*)?", version)
    return release[1] if release else version
