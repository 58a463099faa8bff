"""What Triton needs of a machine beside a GPU: to be there, new enough, and a C compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import attn_kd
from attn_kd.ops import triton_installation


@pytest.fixture(autouse=True)
def _not_asked_yet() -> Iterator[None]:
    triton_installation.missing_reason.cache_clear()
    yield
    triton_installation.missing_reason.cache_clear()


def test_without_triton_its_import_error_is_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    able, reason = attn_kd.available_backends()["triton"]
    assert not able and "import of triton halted" in reason


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.5.0+git0d4682f0"])
def test_an_old_version_is_the_reason(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    able, reason = attn_kd.available_backends()["triton"]
    assert not able and reason == f"Triton {version} is installed, needs 3.6 or newer"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+git0d4682f0", "4.0.0"])
def test_newer_versions_will_do(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert triton_installation.missing_reason() is None


def test_triton_is_looked_for_once(monkeypatch):
    """Every call of the operator asks."""
    first = triton_installation.missing_reason()
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="1.0"))
    assert triton_installation.missing_reason() == first


def test_a_source_tree_that_is_not_installed_is_the_reason(tmp_path):
    """Its device code is a folder beside the package."""
    pytest.importorskip("triton")
    ignored = shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(Path(attn_kd.__file__).parent, tmp_path / "attn_kd", ignore=ignored)
    program = "import attn_kd; print(attn_kd.available_backends()['triton'].reason)"
    # No .pth file is read without site, so that no installation of attn_kd is found.
    packages = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("attn_kd.kernels is not there (this source tree is not installed")


LAUNCH = """
import torch, attn_kd
from attn_kd.ops.backends import Call, select_backend
if not torch.cuda.is_available():
    torch.cuda.is_available = lambda: True  # which Triton asks, too
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device: (8, 0)
    torch.cuda.get_device_name = lambda: "a GPU"
    torch.version.cuda = "13.0"
print(attn_kd.available_backends()["triton"].reason)
try:
    select_backend("triton", Call(torch.device("cuda", 0), (32, 32, 32)))
except attn_kd.InputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(None, "Failed to find C compiler"), ("false", "false fails; it takes a C compiler and")],
    ids=["no compiler", "one that fails"],
)
def test_a_launcher_that_cannot_be_compiled_is_the_reason(tmp_path, compiler, reason):
    """In a process of its own, where Triton has compiled nothing yet and finds nothing cached."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PATH": "", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["TRITON_LIBCUDA_PATH"] = str(tmp_path)  # not looked into before it is compiled
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("CC", None)
    if compiler is not None:
        environment["CC"] = str(shutil.which(compiler))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said, refused = done.stdout.splitlines()
    assert said.startswith("Triton cannot launch kernels (") and reason in said
    assert refused == f"backend='triton' cannot run here: {said}"
