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
# Compiling and linking make empty files.
SUCCEEDS = """
while [ "$1" != "-o" ]; do shift; done
: > "$2"
"""
NVCC = """#!/bin/sh
case " $* " in *" --version "*) echo 'Cuda compilation tools, release {release}, V'; exit 0 ;; esac
echo 'nvcc has no luck' >&2
exit 1
"""
# setup.py with a torch that says it is a CUDA build.
SETUP_WITH_CUDA = """
import os, runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
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

    def run(*, torch_has_cuda: bool = False, **variables: str) -> Build:
        lib = tmp_path / "lib"
        script = ["-c", SETUP_WITH_CUDA] if torch_has_cuda else ["setup.py"]
        command = [sys.executable, *script, "build_ext", "--build-lib", lib]
        # Where torch is a CUDA build and there is an nvcc, it would be minutes of CUDA kernels.
        environment = {**os.environ, "ATTN_KD_BUILD_CUDA": "never", **variables}
        done = subprocess.run(
            [*command, "--build-temp", tmp_path / "temp"],
            cwd=ROOT,
            env=environment,
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


def toolkit(folder: Path, release: str) -> str:
    """Write an nvcc that compiles nothing; return the path of its toolkit, for CUDA_HOME."""
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release))
    nvcc.chmod(0o755)
    return str(nvcc.parents[1])


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
    done = build(ATTN_KD_BUILD_EXTENSION="never", ATTN_KD_BUILD_CUDA="require")
    assert done.returncode == 0
    assert done.record["reason"] == "ATTN_KD_BUILD_EXTENSION=never was set for the build"


@pytest.mark.parametrize("name", ["ATTN_KD_BUILD_EXTENSION", "ATTN_KD_BUILD_CUDA"])
def test_unknown_mode_is_refused_in_one_line(build, name):
    done = build(**{name: "yes"})
    assert done.returncode != 0
    assert done.stderr == f"{name}='yes': expected auto, never or require\n"


@pytest.mark.parametrize(
    ("release", "mode", "reason"),
    [
        ("13.1", "auto", "the build of the CUDA kernels failed: "),
        ("12.8", "auto", "nvcc 12.8 against CUDA 13.0 of torch"),
        ("13.1", "never", "ATTN_KD_BUILD_CUDA=never"),
        (None, "auto", "no nvcc"),
    ],
    ids=["nvcc fails", "another nvcc", "never", "no nvcc"],
)
def test_cpu_kernels_are_built_where_those_of_cuda_are_not(build, tmp_path, release, mode, reason):
    done = build(
        torch_has_cuda=True,
        CXX=compiler(tmp_path, macro="__GNUC__", rest=SUCCEEDS),
        CUDA_HOME=str(tmp_path) if release is None else toolkit(tmp_path, release),
        ATTN_KD_BUILD_EXTENSION="require",
        ATTN_KD_BUILD_CUDA=mode,
    )
    assert done.returncode == 0, done.stderr
    assert done.extension
    assert done.record["extension"] is True
    assert done.record["reason"] is None
    assert done.record["cuda"].startswith(reason)


@pytest.mark.parametrize(
    ("release", "reason"),
    [("13.1", "compiling objects"), ("12.8", "ATTN_KD_BUILD_CUDA=require: nvcc 12.8 against")],
    ids=["nvcc fails", "another nvcc"],
)
def test_no_cuda_kernels_are_an_error_where_they_are_required(build, tmp_path, release, reason):
    done = build(
        torch_has_cuda=True,
        CXX=compiler(tmp_path, macro="__GNUC__", rest=SUCCEEDS),
        CUDA_HOME=toolkit(tmp_path, release),
        ATTN_KD_BUILD_CUDA="require",
    )
    assert done.returncode != 0
    assert reason in done.stderr
    assert done.record is None
