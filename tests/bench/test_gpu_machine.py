"""What is missing on a machine is said before anything runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_machine import STEPS, lacking

ROOT = Path(__file__).resolve().parents[2]


def test_every_step_of_the_script_is_known():
    script = (ROOT / "bench" / "gpu_session.sh").read_text()
    (listed,) = [line for line in script.splitlines() if line.endswith(") ;;") and "tune |" in line]
    assert [word.strip() for word in listed.partition(")")[0].split("|")] == [*STEPS]


@pytest.mark.parametrize(
    ("step", "package"),
    [("bench", "pytest_benchmark"), ("tests", "hypothesis"), ("tune", "triton")],
)
def test_a_missing_package_is_named_for_the_steps_that_need_it(monkeypatch, step, package):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == package else find(name))
    assert lacking([step]) == [f"{sys.executable} has no {package}"]
    others = lacking(["resources"])
    assert (package == "triton") == any(package in line for line in others)


def test_kernels_of_another_checkout_are_not_taken_for_those_that_are_here(tmp_path):
    """The package is that of the working folder whatever is installed; its device code is not."""
    here = tmp_path / "checkout"
    for folder in ("bench", "attn_kd"):
        (here / folder).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / folder, here / folder], check=True)
    paths = os.pathsep.join([str(here), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_machine", "tune"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"gpu_session.sh: attn_kd is not installed from {here}; there:")


def test_what_the_build_installs_need_not_be_there_before(monkeypatch):
    monkeypatch.setattr("bench.gpu_machine.ROOT", Path("/another/checkout"))
    assert any("is not installed" in line for line in lacking(["bench"]))
    assert not any("is not installed" in line for line in lacking(["build", "bench"]))
