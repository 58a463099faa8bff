"""The script for a machine with a GPU, as far as another machine can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FAKE_PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in *"{failing}"*) exit 1 ;; esac
"""


def session(*steps: str, python: Path | str, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHON": str(python),
        "OUT": str(out),
        "CALLS": str(out / "calls"),
    }
    command = ["sh", ROOT / "bench" / "gpu_session.sh", *steps]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def fake_python(folder: Path, *, failing: str = "no such call") -> Path:
    """An interpreter that writes down what it is called with."""
    program = folder / "python"
    program.write_text(FAKE_PYTHON.format(failing=failing))
    program.chmod(0o755)
    return program


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path):
    done = session(python=sys.executable, out=tmp_path)
    assert done.returncode == 1
    assert f"gpu_session.sh: {os.path.abspath(sys.executable)} finds no GPU\n" in done.stderr


def test_a_step_that_takes_too_long_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMIT", "1")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *pytest*) exec sleep 60 ;; esac\n')
    python.chmod(0o755)
    done = session("gpu", "resources", python=python, out=tmp_path)
    assert done.stderr == "failed: gpu\n"


def test_a_step_that_fails_is_named_and_the_next_is_run(tmp_path):
    python = fake_python(tmp_path, failing="-m pytest")
    done = session("tests", "resources", python=python, out=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "failed: tests\n"
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "-m bench.kernel_resources"


def test_steps_that_succeed_leave_their_logs(tmp_path):
    done = session("build", "tests", python=fake_python(tmp_path), out=tmp_path)
    assert done.returncode == 0
    logs = {path.name for path in tmp_path.glob("*.log")}
    assert logs == {"gpu-build.log", "gpu-info.log", "gpu-tests.log"}


def test_a_package_that_is_not_installed_is_installed_before_it_is_built(tmp_path):
    """Else there is no attn_kd.kernels, and with it nothing of Triton."""
    done = session("build", python=fake_python(tmp_path, failing="attn_kd.kernels"), out=tmp_path)
    assert done.returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if not call.startswith("-c")] == [
        "-m bench.gpu_machine build",
        "-m pip install --no-build-isolation --no-deps --editable .",
        "setup.py build_ext --inplace",
        "-m attn_kd info",
    ]


def test_sanitizers_watch_tensors_that_are_allocations_of_their_own(tmp_path, monkeypatch):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $2" >>"$CALLS"\n')
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    done = session("sanitize", python=fake_python(tmp_path), out=tmp_path)
    assert done.returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()[1:]  # the first asks for a GPU
    assert calls == [
        line
        for backend in ("triton", "cuda")
        for line in (
            f"-m bench.sanitizer_cases --backend {backend} --jobs 0",
            "1 memcheck",
            "1 racecheck",
        )
    ]


def test_an_unknown_step_is_refused_before_any_is_run(tmp_path):
    done = session("build", "dance", python=fake_python(tmp_path), out=tmp_path)
    assert (done.returncode, done.stderr) == (2, "gpu_session.sh: unknown step 'dance'\n")
    assert not (tmp_path / "calls").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = session("build", python=fake_python(tmp_path), out=tmp_path / "file")
    assert done.returncode == 1


def test_a_gpu_measures_what_there_are_goals_for_first():
    """The time on one may end before the benchmarks do; float32 comes last."""
    options = ["--collect-only", "--quiet", "--benchmark-only", "--device", "cuda"]
    command = [sys.executable, "-m", "pytest", "bench", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert {name.partition("[")[2].rpartition("-")[0] for name in names[:4]} == {
        "bfloat16-dc5",
        "bfloat16-video",
    }
    assert names[4].startswith("test_replay")
    is_float32 = ["float32" in name for name in names]
    assert is_float32 == sorted(is_float32) and is_float32[-1]
