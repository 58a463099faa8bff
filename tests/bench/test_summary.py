"""The summary of a real, tiny benchmark run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import summary
from bench.measurements import read_run
from bench.summary import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The JSON of the smallest measurements with the fewest rounds, on one thread."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    chosen = (
        "bench/bench_attention_kl.py::test_attention_kl[float32-paper-forward]",
        "bench/bench_latency.py::test_overhead[forward-1]",
        "bench/bench_memory.py::test_peak_memory[hw169]",
    )
    command = [sys.executable, "-m", "pytest", *chosen, "--benchmark-only", "--budget", "0"]
    done = subprocess.run(
        [*command, "--benchmark-json", path, "-p", "no:cacheprovider", "--threads", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": "", "CXX": "none"},  # without torch.compile
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_every_candidate_was_timed(results):
    (timing,) = read_run(results).of("time")
    assert list(timing.seconds) == [
        "sdpa",
        "attn_kd",
        "attn_kd.attention",
        "sdpa_identity",
        "eager",
    ]
    assert len(timing.seconds["attn_kd"]) == 3
    assert all(second > 0 for seconds in timing.seconds.values() for second in seconds)


def test_the_run_tells_machine_threads_versions_and_errors(results):
    run = read_run(results)
    assert run.machine["torch"]["threads"] == 1
    assert run.machine["torch"]["version"] in summary.machine_line(run)
    assert run.of("time")[0].errors["attn_kd"]["kl"] < 1e-5


def test_the_command_prints_the_tables(results, capsys):
    assert main([str(results)]) == 0
    printed = capsys.readouterr().out
    assert "| paper (8, 8, 169, 169, 32) | forward | 3 " in " ".join(printed.split())
    assert "attn_kd / sdpa" in printed


def test_times_of_several_calls_are_told_per_call(results):
    content = json.loads(results.read_text())
    (stored,) = (b for b in content["benchmarks"] if b["extra_info"]["kind"] == "overhead")
    (timing,) = read_run(results).of("overhead")
    calls = stored["extra_info"]["calls"]
    assert calls > 1
    in_a_row = stored["extra_info"]["seconds"]["attn_kd"]
    assert timing.seconds["attn_kd"] == [time / calls for time in in_a_row]
    # pytest-benchmark's own clock sees the same calls, and what is around them.
    around = stored["stats"]["data"]
    assert all(inner <= outer for inner, outer in zip(in_a_row, around, strict=True))


def test_memory_is_that_of_processes(results):
    (memory,) = read_run(results).memory_of("memory")
    assert memory.median("eager") > 2 * memory.median("attn_kd") > 0


def test_figures_are_drawn_on_request_of_what_was_measured(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(results), "--figures", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.png"]
    assert capsys.readouterr().err == f"drawn: {tmp_path / 'benchmark.png'}\n"


@pytest.mark.parametrize("content", ["no json", "[]", json.dumps({"benchmarks": []})])
def test_another_file_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main([str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "other.json was not written by pytest bench" in message


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
