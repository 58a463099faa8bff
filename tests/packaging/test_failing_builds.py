"""A build that cannot make the extension says why, and is an error only where it is required."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import attn_kd

ROOT = Path(attn_kd.__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compilers as on Linux"),
]

# What setup.py and torch ask a compiler before they use it; the rest follows.
COMPILER = """#!/bin/sh
case " $* " in
*" -dM "*) echo '#define {macro} 14'; exit 0 ;;
*" -dumpversion "*) echo 14.0.0; exit 0 ;;
esac
{rest}
"""
# Compiling makes an empty object, linking fails.
FAILS_TO_LINK = """
case " $* " in *" -shared "*) echo 'cannot find -lc10' >&2; exit 1 ;; esac
while [ "$1" != "-o" ]; do shift; done
: > "$2"
"""


class Build(NamedTuple):
    """What a build left behind."""

    returncode: int
    stderr: str
    record: dict | None
    extension: bool


@pytest.fixture
def build(tmp_path):
    """Build outside the source tree, with environment variables on top of the usual ones."""

    def run(**variables: str) -> Build:
        lib = tmp_path / "lib"
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", lib]
        done = subprocess.run(
            [*command, "--build-temp", tmp_path / "temp"],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        record = lib / "attn_kd" / "_build.json"
        return Build(
            done.returncode,
            done.stderr,
            json.loads(record.read_text()) if record.exists() else None,
            bool(list(lib.rglob("_C.*"))),
        )

    return run


def compiler(folder: Path, *, macro: str, rest: str = "exit 1") -> str:
    """Write a compiler that fails in a given way; return its path, for CXX."""
    path = folder / "g++"
    path.write_text(COMPILER.format(macro=macro, rest=rest))
    path.chmod(0o755)
    return str(path)


@pytest.fixture(params=["missing", "clang", "fails to link"])
def obstacle(request, tmp_path) -> tuple[str, str]:
    """A compiler that is of no use, and the beginning of the reason."""
    if request.param == "missing":
        path = str(tmp_path / "none" / "g++")
        return path, f"no C++ compiler: {path} was not found"
    if request.param == "clang":
        path = compiler(tmp_path, macro="__clang__")
        return path, f"{path} is clang, whose OpenMP is not the one of torch"
    return compiler(tmp_path, macro="__GNUC__", rest=FAILS_TO_LINK), "the build failed: "


def test_goes_on_without_the_extension_and_records_why(build, obstacle):
    path, reason = obstacle
    done = build(CXX=path, ATTN_KD_BUILD_EXTENSION="auto")
    assert done.returncode == 0, done.stderr
    assert not done.extension
    assert done.record["extension"] is False
    assert done.record["reason"].startswith(reason)
    assert f"installed without its compiled kernels: {reason}" in done.stderr


def test_failure_to_link_is_an_error_where_the_extension_is_required(build, tmp_path):
    path = compiler(tmp_path, macro="__GNUC__", rest=FAILS_TO_LINK)
    done = build(CXX=path, ATTN_KD_BUILD_EXTENSION="require")
    assert done.returncode != 0
    assert "cannot find -lc10" in done.stderr
    assert done.record is None


def test_never_tries_nothing(build):
    done = build(ATTN_KD_BUILD_EXTENSION="never")
    assert done.returncode == 0
    assert done.record["reason"] == "ATTN_KD_BUILD_EXTENSION=never was set for the build"


def test_unknown_mode_is_refused_in_one_line(build):
    done = build(ATTN_KD_BUILD_EXTENSION="yes")
    assert done.returncode != 0
    assert done.stderr == "ATTN_KD_BUILD_EXTENSION='yes': expected auto, never or require\n"
