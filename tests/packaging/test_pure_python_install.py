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
# What one needs besides to develop; the source archive has it, an installation has not.
DEVELOPMENT = ("MANIFEST.in", "Makefile", "constraints.txt", "CHANGELOG.md", "tests", "bench")
BROKEN_COMPILER = {"CC": "false", "CXX": "false"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """A copy of the tree without what earlier builds and benchmarks left behind."""
    tree = tmp_path_factory.mktemp("source")
    leftovers = shutil.ignore_patterns(
        "__pycache__", "_C.*", "_build.json", "results.json", "gpu-*", "figures"
    )
    for name in (*BUILD_INPUTS, *DEVELOPMENT):
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
    assert record["reason"].startswith("the build failed:")


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
    assert "the build failed" in result.stderr


def test_info_names_the_reason(installation):
    result = run_installed(installation, "-m", "attn_kd", "info")
    assert "the build failed:" in result.stdout


@pytest.fixture(scope="module")
def archived(source_tree, tmp_path_factory) -> set[str]:
    """The paths in the source archive, relative to its root."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--formats=zip", "--dist-dir", out],
        cwd=source_tree,
        env={**os.environ, "ATTN_KD_BUILD_EXTENSION": "never"},
        check=True,
        capture_output=True,
    )
    (archive,) = out.glob("*.zip")
    return {Path(*Path(name).parts[1:]).as_posix() for name in ZipFile(archive).namelist()}


@pytest.mark.parametrize("name", [*BUILD_INPUTS, *DEVELOPMENT])
def test_source_archive_carries_what_building_and_testing_need(source_tree, archived, name):
    path = source_tree / name
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    assert {file.relative_to(source_tree).as_posix() for file in files} - archived == set()


def test_source_archive_carries_nothing_that_was_built(archived):
    assert not [name for name in archived if name.endswith((".so", ".pyc", "_build.json"))]


def test_an_installation_is_the_package_alone(installation):
    folders = {path.name for path in installation.iterdir() if path.suffix != ".dist-info"}
    assert folders - {"bin"} == {"attn_kd"}
