"""The calls that a sanitizer watches are calls that compute the right thing."""

from __future__ import annotations

import pytest
import torch

from attn_kd.ops import extension
from bench import sanitizer_cases
from bench.sanitizer_cases import CASES, check, main

CPU = torch.device("cpu")


@pytest.mark.skipif(extension.module is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_and_is_right(name):
    assert check(name, CPU, "cpu") == "right"


def test_a_wrong_result_is_seen(monkeypatch):
    monkeypatch.setattr(sanitizer_cases, "TOLERANCE", 0.0)
    with pytest.raises(AssertionError, match=r"output is .* off"):
        check("head_dim 32", CPU, "reference")


def test_a_backend_that_refuses_everything_is_no_success(capsys):
    assert main(["--backend", "cuda", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("refused: backend='cuda' cannot run here") == len(CASES)
    assert printed.err == "nothing was right\n"


@pytest.mark.skipif(extension.module is None, reason="needs the compiled kernels")
def test_cases_after_a_wrong_one_are_run(monkeypatch, capsys):
    some = {"heads": {"heads": "three"}, "head_dim 32": CASES["head_dim 32"]}
    monkeypatch.setattr(sanitizer_cases, "CASES", some)
    assert main(["--backend", "cpu", "--device", "cpu"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("heads: failed: TypeError: ") and second == "head_dim 32: right"


@pytest.mark.skipif(extension.module is None, reason="needs the compiled kernels")
def test_several_processes_say_what_one_says(capsys):
    printed = []
    for jobs in ("1", "2"):
        assert main(["--backend", "cpu", "--device", "cpu", "--jobs", jobs]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count(": right") == len(CASES)
