"""Tables of measurements, and goals met or missed."""

from __future__ import annotations

import pytest

from bench.measurements import Memory
from bench.model_tables import inference_table, teacher_cache_table, training_table
from bench.operator_tables import (
    error_table,
    memory_table,
    overhead_table,
    ratio_table,
    split_table,
    threads_table,
)
from bench.summary import goal_table
from bench.tables import markdown, milliseconds
from bench.targets import GOALS, OVERHEAD, Goal
from tests.bench.runs import run_of, timing


def of_goal(goal: Goal, ratio: float):
    place = {"kind": goal.kind, "shape": goal.shape, "dtype": goal.dtype}
    seconds = {goal.peer: [0.9, 1.0, 1.4], goal.candidate: [ratio] * 3}
    return timing(seconds, pass_name=goal.pass_name, **place)


@pytest.mark.parametrize(
    "goal", GOALS, ids=lambda g: f"{g.device}-{g.candidate}-{g.shape}-{g.pass_name}"
)
def test_a_goal_is_met_up_to_its_limit_and_missed_above(goal):
    def verdicts(ratio: float) -> set[str]:
        rows = goal_table(run_of(of_goal(goal, ratio), device=goal.device))[1:]
        name = f"{goal.candidate} / {goal.peer}"
        return {row[-1].split()[-1] for row in rows if row[0] == name}

    assert verdicts(goal.limit) == {"met"}
    assert verdicts(goal.limit + 1e-6) == {"missed"}


def test_the_first_bar_stands_before_the_goal():
    assert all(goal.first is None or goal.first > goal.limit for goal in GOALS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_is_held_to_the_goals_of_its_device(device):
    goals = [goal for goal in GOALS if (goal.shape, goal.dtype) == ("dc5", "bfloat16")]
    rows = goal_table(run_of(*(of_goal(goal, 0.1) for goal in set(goals)), device=device))[1:]
    limits = {f"≤ {goal.limit:.2f} met" for goal in goals if goal.device == device}
    assert {row[-1] for row in rows} == limits


def test_goals_that_were_not_measured_are_left_out():
    assert len(goal_table(run_of(timing({"sdpa": [1.0]})))) == 1


def test_one_head_that_is_faster_by_more_than_ten_percent_misses_the_goal():
    seconds = {"attn_kd": [1.0], "attn_kd, one head": [0.85]}
    measured = timing(seconds, kind="split", shape="64-heads")
    verdicts = [row[-1].split()[-1] for row in goal_table(run_of(measured))[1:]]
    assert sorted(verdicts) == ["met", "missed"]


def overhead_of(microseconds: float):
    # A head's arithmetic takes 2 µs, so that of 17 takes 34.
    seconds = {
        "attn_kd": [1e-6 * (microseconds + 2)],
        "attn_kd, 17 heads": [1e-6 * (microseconds + 34)],
    }
    sizes = {"heads": 17}
    return timing(seconds, kind="overhead", shape="16x16", pass_name="forward", sizes=sizes)


def test_overhead_is_what_is_left_of_a_call_without_its_arithmetic():
    assert overhead_table([overhead_of(30.0)])[1][2:] == ["32.0", "2.0", "30.0"]


@pytest.mark.parametrize(("beyond", "expected"), [(-0.01, "met"), (0.01, "missed")])
def test_overhead_has_a_goal(beyond, expected):
    row = goal_table(run_of(overhead_of(1e6 * OVERHEAD + beyond)))[1]
    assert row[-1] == f"≤ 8 µs {expected}"


def memory(beyond: int) -> Memory:
    sizes = {"Lk": 4200}
    peaks = {"sdpa": [10, 20, 30], "attn_kd": [20 + beyond] * 3}
    return Memory("memory", "dc5", sizes, peaks, map_bytes=100)


@pytest.mark.parametrize(("beyond", "expected"), [(2, "met"), (4, "missed")])
def test_memory_is_told_relative_to_sdpa_in_maps(beyond, expected):
    assert memory_table([memory(beyond)])[1][-1] == f"+{beyond}.0% of a map"
    assert goal_table(run_of(memory=(memory(beyond),)))[1][-1] == f"≤ 2% {expected}"


def test_ratios_are_those_of_medians_and_empty_without_a_peer():
    measured = timing({"sdpa": [0.9, 1.0, 1.4], "attn_kd": [0.5] * 3, "eager": [2.0] * 3})
    assert measured.ratio("sdpa") == 0.5
    assert measured.ratio("compiled") is None
    head, row = ratio_table([measured])
    assert row[head.index("attn_kd / eager")] == "0.250"
    assert row[head.index("attn_kd.attention / sdpa")] == ""


def test_a_single_round_has_no_spread():
    measured = timing({"attn_kd": [0.002], "sdpa": [0.001, 0.002, 0.003]})
    assert milliseconds(measured, "attn_kd") == "2.00"
    assert milliseconds(measured, "sdpa") == "2.00 ± 0.50"


def on_threads(threads: int, seconds: float):
    return timing({"sdpa": [seconds] * 2, "attn_kd": [seconds] * 2}, threads=threads)


def test_speed_up_is_that_over_one_thread():
    rows = threads_table([on_threads(1, 3.0), on_threads(2, 2.0)])
    assert [row[3] for row in rows[1:]] == ["1.00", "1.50"]


def test_speed_up_is_left_out_where_one_thread_was_not_measured():
    row = threads_table([on_threads(2, 2.0)])[1]
    assert row == ["coco", "2", "2000 ± 0", "", "2000 ± 0", "", "1.000"]


def test_one_head_is_compared_with_sixty_four():
    seconds = {"sdpa": [1.0], "sdpa, one head": [3.0]}
    seconds |= {"attn_kd": [1.0], "attn_kd, one head": [1.05]}
    rows = split_table([timing(seconds, kind="split")])
    assert [row[-1] for row in rows[1:]] == ["3.000", "1.050"]


def test_errors_are_the_largest_of_all_measurements():
    small, large = ({"sdpa": {"output": e}} for e in (1e-7, 2e-7))
    rows = error_table([timing({}, errors=small), timing({}, errors=large)])
    assert rows == [["candidate", "output"], ["`sdpa`", "2.0e-07"]]


def test_what_a_divergence_adds_is_told_beyond_the_teacher():
    seconds = {"none": [1.0], "teacher": [2.0], "attn_kd": [2.2], "eager": [4.0]}
    row = training_table([timing(seconds, kind="training", sizes={"batch": 1})])[1]
    assert row[-3:] == ["+10.0%", "+100.0%", "0.550"]


def test_a_teacher_cache_is_told_by_time_and_size():
    sizes = {"batch": 2, "layer_bytes": 1234, "map_bytes": 98765}
    measured = timing(
        {"attn_kd": [0.2], "teacher cache": [0.15]},
        kind="teacher cache",
        pass_name="backbone frozen",
        sizes=sizes,
        errors={"teacher cache": {"attention_kl": 2e-6}},
    )
    head, row = teacher_cache_table([measured])
    cells = dict(zip(head, row, strict=True))
    assert [cells["batch"], cells["way"]] == ["2", "backbone frozen"]
    assert [cells["`attn_kd`"], cells["`teacher cache`"]] == ["200", "150"]
    assert cells["cache / teacher"] == "0.750"
    assert cells["divergence off by"] == "2.0e-06"
    assert [cells["kB a layer and image"], cells["float32 maps, kB"]] == ["1.2", "98.8"]


def test_images_per_second_are_the_inverse_of_a_latency():
    seconds = {"sdpa": [0.1], "attn_kd": [0.05], "eager": [0.2]}
    row = inference_table([timing(seconds, kind="inference")])[1]
    assert row[-4:] == ["10.0", "20.0", "5.0", "0.500"]


def test_columns_of_a_table_are_aligned():
    lines = markdown([["a", "long head"], ["long cell", "b"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|-----------|-----------|"
