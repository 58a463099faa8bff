"""Where the compiler and the driver are looked for, and what they are taken to say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from attn_kd._nvidia import driver_version, find_nvcc, nvcc_release

Program = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither PATH nor the environment knows of any."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Write bin/NAME in a folder, a program that prints something."""

    def write(folder: str, name: str, says: str = "", status: int = 0) -> Path:
        path = tmp_path / folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_named_toolkit_goes_before_the_one_on_path(program, monkeypatch, variable):
    named, other = program("named", "nvcc"), program("other", "nvcc")
    monkeypatch.setenv("PATH", str(other.parent))
    assert find_nvcc() == str(other)
    monkeypatch.setenv(variable, str(named.parents[1]))
    assert find_nvcc() == str(named)


def test_a_named_toolkit_without_nvcc_has_none(program, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(program("other", "nvcc").parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() is None


@pytest.mark.parametrize(
    ("says", "expected"),
    [("Cuda compilation tools, release 13.0, V13.0.88", "13.0"), ("?", None)],
    ids=["release", "nonsense"],
)
def test_release_of_nvcc(program, says, expected):
    assert nvcc_release(str(program("toolkit", "nvcc", says))) == expected


def test_a_program_for_another_machine_has_no_release(program):
    path = program("toolkit", "nvcc")
    path.write_bytes(b"\x7fELF")
    assert nvcc_release(str(path)) is None


@pytest.mark.parametrize(
    ("says", "status", "expected"),
    [("580.65.06\n580.65.06", 0, "580.65.06"), ("has failed to communicate", 9, None)],
    ids=["two GPUs", "no driver"],
)
def test_version_of_the_driver(program, monkeypatch, says, status, expected):
    path = program("system", "nvidia-smi", says, status)
    monkeypatch.setenv("PATH", str(path.parent))
    assert driver_version() == expected


def test_without_its_program_there_is_no_driver():
    assert driver_version() is None
