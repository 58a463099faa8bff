"""An installation without the compiled extension: complete, slower, and able to say why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

import attn_kd

ROOT = Path(attn_kd.__file__).parents[1]
BUILD_INPUTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "attn_kd", "csrc", "kernels")
BROKEN_COMPILER = {"CC": "false", "CXX": "false"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """A copy of what a build reads, without what earlier builds left behind."""
    tree = tmp_path_factory.mktemp("source")
    leftovers = shutil.ignore_patterns("__pycache__", "_C.*", "_build.json")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=leftovers)
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def installation(source_tree, tmp_path_factory) -> Path:
    """The folder with attn_kd as pip installs it where the compiler fails."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    environment = {**os.environ, **BROKEN_COMPILER, "ATTN_KD_BUILD_EXTENSION": "auto"}
    subprocess.run(
        [*pip, "--target", target, source_tree], env=environment, check=True, capture_output=True
    )
    return target


def run_installed(installation: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S, with site-packages as an ordinary path: the import hook of an editable installation would
    # find the extension of the development tree.
    paths = [str(installation), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=installation,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )


def test_has_no_compiled_file(installation):
    assert (installation / "attn_kd" / "ops").is_dir()
    assert not list(installation.rglob("*.so"))


def test_records_why(installation):
    record = json.loads((installation / "attn_kd" / "_build.json").read_text())
    assert record["extension"] is False
    assert record["reason"].startswith("compilation failed:")


def test_installs_device_code_as_a_subpackage(installation):
    result = run_installed(installation, "-c", "import attn_kd.kernels as k; print(k.__file__)")
    assert Path(result.stdout.strip()).is_relative_to(installation)


def test_computes_through_the_reference_backend_and_warns_once(installation):
    program = """
import torch, attn_kd
x = torch.randn(1, 2, 5, 4, requires_grad=True)
for _ in range(3):
    out = attn_kd.attention_kl(x, x, x, x.detach(), x.detach())
(out.output.sum() + out.kl.sum()).backward()
assert torch.isfinite(x.grad).all() and out.kl.abs().max() < 1e-6
"""
    result = run_installed(installation, "-c", program)
    assert result.stderr.count("reference backend") == 1
    assert "compilation failed" in result.stderr


def test_info_names_the_reason(installation):
    result = run_installed(installation, "-m", "attn_kd", "info")
    assert "compilation failed:" in result.stdout


def test_required_extension_makes_the_failure_an_error(source_tree, tmp_path):
    environment = {**os.environ, **BROKEN_COMPILER, "ATTN_KD_BUILD_EXTENSION": "require"}
    result = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            tmp_path,
            "--build-temp",
            tmp_path,
        ],
        cwd=source_tree,
        env=environment,
        capture_output=True,
    )
    assert result.returncode != 0


def test_source_archive_carries_the_kernels(source_tree, tmp_path):
    environment = {**os.environ, "ATTN_KD_BUILD_EXTENSION": "never"}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--formats=zip", "--dist-dir", tmp_path],
        cwd=source_tree,
        env=environment,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.zip")
    archived = {Path(*Path(name).parts[1:]).as_posix() for name in ZipFile(archive).namelist()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources <= archived
