"""The summary of a real, tiny benchmark run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import summary
from bench.measurements import Memory, Timing, read_run
from bench.summary import main, markdown, memory_table, ratio_table, threads_table
from bench.targets import AGAINST_SDPA

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The JSON of the smallest measurement, forward in float32, with the fewest rounds."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    chosen = "bench/bench_attention_kl.py::test_attention_kl[float32-paper-forward]"
    command = [sys.executable, "-m", "pytest", chosen, "--benchmark-only", "--budget", "0"]
    done = subprocess.run(
        [*command, "--benchmark-json", path, "-p", "no:cacheprovider", "--threads", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_every_candidate_was_timed_in_every_round(results):
    (timing,) = read_run(results).timings
    assert list(timing.seconds) == [
        "sdpa",
        "attn_kd",
        "attn_kd.attention",
        "sdpa_identity",
        "eager",
    ]
    assert {len(seconds) for seconds in timing.seconds.values()} == {5}
    assert all(second > 0 for seconds in timing.seconds.values() for second in seconds)


def test_the_run_tells_machine_threads_versions_and_errors(results):
    run = read_run(results)
    assert run.machine["torch"]["threads"] == 1
    assert run.machine["torch"]["version"] in summary.machine_line(run)
    assert run.timings[0].errors["attn_kd"]["kl"] < 1e-5


def test_the_command_prints_the_tables(results, capsys):
    assert main([str(results)]) == 0
    printed = capsys.readouterr().out
    assert "| paper (8, 8, 169, 169, 32) | forward | 5 " in " ".join(printed.split())
    assert "attn_kd / sdpa" in printed


def test_the_figure_is_drawn_on_request(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "images" / "ratios.png"
    assert main([str(results), "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert list(figure.parent.iterdir()) == [figure]


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


def timing(ratio: float) -> Timing:
    seconds = {"sdpa": [0.9, 1.0, 1.4], "attn_kd": [ratio, ratio, ratio]}
    return Timing("coco", "forward+backward", "float32", {}, seconds, {})


@pytest.mark.parametrize("name", ["first", "goal"])
def test_a_target_is_met_up_to_its_limit_and_missed_above(name):
    limit = getattr(AGAINST_SDPA["float32", "forward+backward", "coco"], name)
    column = {"first": 3, "goal": 4}[name]
    assert ratio_table([timing(limit)])[1][column].endswith("met")
    assert ratio_table([timing(limit + 1e-6)])[1][column].endswith("missed")


def test_ratios_are_those_of_medians():
    assert timing(0.5).ratio("sdpa") == 0.5
    assert timing(0.5).ratio("eager") is None


def on_threads(threads: int, seconds: float) -> Timing:
    times = {"sdpa": [seconds] * 2, "attn_kd": [seconds] * 2}
    return Timing("dc5", "forward+backward", "float32", {}, times, {}, threads)


def test_speed_up_is_that_over_one_thread():
    rows = threads_table([on_threads(1, 3.0), on_threads(2, 2.0)])
    assert [row[3] for row in rows[1:]] == ["1.00", "1.50"]


def test_speed_up_is_left_out_where_one_thread_was_not_measured():
    row = threads_table([on_threads(2, 2.0)])[1]
    assert row == ["dc5", "2", "2000 ± 0", "", "2000 ± 0", "", "1.000"]


def test_memory_is_told_relative_to_sdpa_in_maps():
    memory = Memory("dc5", {}, {"sdpa": [10, 20, 30], "attn_kd": [24, 24, 24]}, map_bytes=100)
    assert memory_table(memory)[2][-2:] == ["+4.0% of a map", "≤ 2% missed"]


def test_columns_of_a_table_are_aligned():
    lines = markdown([["a", "long head"], ["long cell", "b"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|-----------|-----------|"
