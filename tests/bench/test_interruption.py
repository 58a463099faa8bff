"""A run of the benchmarks that is interrupted keeps what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = """
def test_first(benchmark):
    benchmark.pedantic(int, rounds=3)

def test_second(benchmark):
    def interrupted():
        raise KeyboardInterrupt
    benchmark.pedantic(interrupted, rounds=3)
"""


def test_what_was_measured_before_is_written(tmp_path):
    (tmp_path / "test_toys.py").write_text(BENCHMARKS)
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "bench.conftest", tmp_path]
    done = subprocess.run(
        [*command, "--benchmark-only", "--benchmark-json", results],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "KeyboardInterrupt" in done.stdout
    measured = json.loads(results.read_text())["benchmarks"]
    assert [benchmark["name"] for benchmark in measured] == ["test_first"]
