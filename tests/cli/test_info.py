"""``attn-kd info`` says what is installed, what can run, and why the rest cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import attn_kd
from attn_kd import cli
from attn_kd._build import BuildRecord
from attn_kd.cli import info
from attn_kd.ops import extension

needs_extension = pytest.mark.skipif(
    extension.module is None, reason=f"needs the extension: {extension.missing_reason}"
)


@pytest.fixture
def show(capsys):
    """Run the command with options; return its rows as {section: {name: value}}."""

    def run(*options: str) -> dict[str, dict[str, str]]:
        assert cli.main(["info", *options]) == 0
        sections: dict[str, dict[str, str]] = {}
        for line in capsys.readouterr().out.splitlines():
            if not line.startswith(" "):
                section = sections.setdefault(line.removesuffix(":"), {})
            else:
                name, value = line.strip().split("  ", maxsplit=1)
                section[name] = value.strip()
        return sections

    return run


def test_shows_the_versions(show):
    versions = show()["versions"]
    assert versions["attn_kd"] == attn_kd.__version__
    assert versions["torch"] == torch.__version__


def test_a_package_that_is_missing_is_said_to_be(show, monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("no-such-package",))
    assert show()["versions"]["no-such-package"] == "not installed"


@pytest.mark.parametrize("backend", attn_kd.available_backends())
def test_shows_whether_a_backend_can_run_and_why(show, backend):
    able, reason = attn_kd.available_backends()[backend]
    assert show()["backends"][backend].split(maxsplit=1) == ["yes" if able else "no", reason]


@needs_extension
def test_shows_the_instruction_set_in_use(show):
    before = extension.module.instruction_set()
    extension.module.set_instruction_set("baseline")
    try:
        assert show()["kernels"]["instruction set"] == "baseline, in use"
    finally:
        extension.module.set_instruction_set(before)


@needs_extension
def test_shows_the_torch_of_the_build(show, monkeypatch):
    monkeypatch.setattr(info, "build_record", lambda: BuildRecord(True, None, "9.9.9"))
    assert show()["kernels"]["extension"].startswith("built for torch 9.9.9")


@needs_extension
@pytest.mark.parametrize(
    ("reason", "said"), [("no nvcc", "not compiled in: no nvcc"), (None, "not compiled in")]
)
def test_shows_why_the_extension_has_no_cuda_kernels(show, monkeypatch, reason, said):
    module = SimpleNamespace(**vars(extension.module))
    module.features = lambda: {**extension.module.features(), "cuda": False}
    monkeypatch.setattr(info, "missing_cuda_reason", lambda: reason)
    monkeypatch.setattr(info, "extension", SimpleNamespace(module=module))
    assert show()["kernels"]["cuda"] == said


def test_shows_why_there_is_no_extension(show, monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing_reason", "no C++ compiler: c++ was not found")
    assert show()["kernels"]["extension"] == "no C++ compiler: c++ was not found"


def test_shows_the_threads_asked_for(show):
    before = torch.get_num_threads()
    try:
        assert show("--threads", "1")["machine"]["threads"].startswith("1 of ")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", "13.0, "),
        ("?", "of an unknown version, "),
    ],
    ids=["release", "nonsense"],
)
def test_shows_the_version_of_nvcc(show, monkeypatch, tmp_path, says, expected):
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert show()["cuda"]["nvcc"] == f"{expected}{program}"


@pytest.mark.parametrize(("version", "said"), [("580.65.06", "580.65.06"), (None, "none")])
def test_shows_the_driver(show, monkeypatch, version, said):
    monkeypatch.setattr(info, "driver_version", lambda: version)
    assert show()["cuda"]["driver"] == said


def test_shows_that_there_is_no_nvcc(show, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert show()["cuda"]["nvcc"] == "not found"


@pytest.mark.gpu
def test_shows_the_compute_capability(show):
    major, minor = torch.cuda.get_device_capability()
    assert show()["machine"]["gpu 0"].endswith(f"compute capability {major}.{minor}")
