"""The tuner from its command line to what is to be copied into the tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from attn_kd.kernels.triton.configurations import Tiling
from bench import tune_triton
from bench.cubins import Resources
from bench.kernel_resources import Row
from bench.tiling_trials import Entry, Trial
from bench.tune_triton import main, table_entry, time_table
from bench.workloads import Shape
from tests.kernels.test_compiling_driver import compiling_environment

ROOT = Path(__file__).resolve().parents[2]
ENTRY = Entry("backward_rows", 64, torch.bfloat16)
PRESENT = Trial(Tiling(64, 32, 4, 2), {"dc5": [2e-3, 2e-3], "video": [4e-2]})
FASTER = Trial(Tiling(32, 32, 4, 2, 8), {"dc5": [1e-3, 1e-3], "video": [2e-2]})
TOO_WIDE = Trial(Tiling(128, 32, 4, 2), {"dc5": [], "video": []}, "too large")


def test_every_tiling_has_its_times():
    assert time_table([PRESENT, FASTER, TOO_WIDE]) == [
        ["tiling", "dc5, µs", "video, µs", "to the first"],
        ["`Tiling(64, 32, 4, 2)`", "2000.0", "40000.0", "1.000"],
        ["`Tiling(32, 32, 4, 2, rescale_above=8)`", "1000.0", "20000.0", "0.500"],
        ["`Tiling(128, 32, 4, 2)`", "", "", "too large"],
    ]


def test_the_best_is_printed_as_it_stands_in_the_tables():
    assert table_entry(ENTRY, [PRESENT]) == '("backward_rows", 64): Tiling(64, 32, 4, 2),'
    assert table_entry(ENTRY, [PRESENT, FASTER]) == (
        '("backward_rows", 64): Tiling(32, 32, 4, 2, rescale_above=8),'
        "  # 0.50 of the time of Tiling(64, 32, 4, 2)"
    )


def test_it_runs_from_end_to_end(monkeypatch, capsys):
    monkeypatch.setattr(tune_triton, "SHAPES", {"paper": Shape(B=1, H=2, Lq=20, Lk=30, D=16)})
    monkeypatch.setattr(tune_triton, "compile_near", lambda *_: [])  # on a GPU, for speed alone
    options = ["--kernels", "forward", "--widths", "64", "--budget", "0", "--shapes", "paper"]
    assert main(options) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith('("forward", 64): Tiling(')


def test_without_a_gpu_it_says_what_tilings_need(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command takes it away, for its workers
    needs = Resources(registers=128, stack_bytes=8, local_bytes=0, shared_bytes=40 * 1024)
    row = Row("triton", "head_dim 64, some", "a_kernel", 90, "", 8, 2, True, needs, "")
    monkeypatch.setattr(tune_triton, "compile_near", lambda *_: [row])
    assert main(["--compile-only", "90"]) == 0
    head, _, line = (text.split() for text in capsys.readouterr().out.splitlines())
    assert " ".join(head) == "| kernel | tiling | registers | stack, B | shared, KiB | warps/SM |"
    assert " ".join(line) == "| `a_kernel` | head_dim 64, some | 128 | 8 | 40 | 16 |"


# Five stages of 128 keys, with their values and the teacher's, are more than 163 KiB.
COMPILED = """
import torch
from attn_kd.kernels.triton.configurations import Tiling
from bench.tiling_trials import Entry, compiled_rows

TOO_LARGE = Tiling(16, 128, 4, 5)

entry = Entry("backward_rows", 64, torch.bfloat16)
for tile in (Tiling(64, 32, 4, 2), Tiling(32, 64, 4, 1), TOO_LARGE):
    for row in compiled_rows(entry, tile, 80):
        print(row.kernel, row.tile, row.warps, row.stages, sep=", ")
"""


def test_a_kernel_is_compiled_with_the_tiling_that_is_tried():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        cwd=ROOT,
        env=compiling_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "backward_rows_kernel, 64 × 32, 4, 2",
        "backward_rows_kernel, 32 × 64, 4, 1",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_the_interpreter_it_says_what_can_be_had(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([]) == 2
    expected = "bench.tune_triton: error: torch finds no GPU; see --compile-only\n"
    assert capsys.readouterr().err == expected
