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
    assert printed.err == "nothing was run\n"
